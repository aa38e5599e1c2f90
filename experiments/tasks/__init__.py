"""Data sets as tasks, and their catalogue."""
