"""Data sets: arrays of images and labels, split as the papers split them."""
