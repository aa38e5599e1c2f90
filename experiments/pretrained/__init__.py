"""Pre-trained base models."""
