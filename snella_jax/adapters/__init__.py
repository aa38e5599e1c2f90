"""Adapters apart from a model: their file format, their base, and trees of factors."""
