"""Verbs: one script per stage, run as `python -m pipeline.<verb>` from the repository's root."""
