"""Verbs: one script per DVC stage, each run as `python -m pipeline.<verb>` from the repository's root."""
