"""Applies a trained model to tables: Python API, query, reference and output files, MLflow model.

Imports model, data, common.
"""
