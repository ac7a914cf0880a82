"""The results of an evaluation for people: one HTML page, figures, the table on the console.

Imports evaluation, model, data, common.
"""
