"""Reads HDF5 and Parquet files that may be damaged, hostile or written by other programs.

Every failure is one line with the file, the part of it, what is wrong and what to do.
"""
