"""Scores what a model knows and how it answers."""
