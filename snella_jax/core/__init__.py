"""SNELLA on arrays and trees of arrays, apart from any binding or file format."""
