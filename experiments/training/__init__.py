"""Training: from a batch to a trained model."""
