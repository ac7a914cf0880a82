"""MLflow: runs, what an unreachable server missed, trainings under a run, the model registry.

Imports training, prediction, model, data, common.
"""
