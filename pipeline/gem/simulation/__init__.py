"""Synthetic cohorts with known parameters, and the ideal predictors computed from them.

Imports data, common.
"""
