"""A small ViT on real digits, and what every form does to it (see README.md beside)."""
