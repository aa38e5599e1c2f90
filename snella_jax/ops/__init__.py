"""Numerics on plain arrays: distances, thresholds, matmuls, dropout, recomputation."""
