"""Turns a source into a cohort: quality control, gene selection, splits and their leakage checks.

Imports data, common.
"""
