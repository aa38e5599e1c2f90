"""Published checkpoints: reading, mapping of names, writing."""
