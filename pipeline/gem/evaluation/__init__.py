"""Compares predictors on the test splits: baselines, GEM, ideal predictors, metrics, intervals.

Imports model, simulation, data, common.
"""
