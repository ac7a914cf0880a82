"""Settings compared on inner folds of real and simulated cohorts, one difference at a time."""
