"""Ways to fine-tune a model, one file each, under one trainer."""
