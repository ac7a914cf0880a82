"""Fits a model to a cohort: data set, loop, schedule, checkpoints, model directory.

Imports model, data, common.
"""
