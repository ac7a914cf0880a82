"""The network, its objective, and the trained model with its file.

Imports data, common.
"""
