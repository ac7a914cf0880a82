"""Nouns: the shared model module behind every stage."""
