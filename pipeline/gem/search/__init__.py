"""Hyperparameter searches with Optuna: space, trials, confirmation, results.

Imports tracking, training, model, data, common.
"""
