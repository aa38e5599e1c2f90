"""Reading and writing files: whole or not at all, by one process of several."""
