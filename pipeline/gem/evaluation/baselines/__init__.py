"""Baselines: predictors without a network, fitted on sums over the training split."""
