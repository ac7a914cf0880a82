"""Baselines: predictors without a network, fitted on sums over the samples outside the test."""
