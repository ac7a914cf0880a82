"""Cohorts on disk, sources, covariates and their encoding, names of splits.

Imports common.
"""
