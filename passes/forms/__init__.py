"""One file per form of attention; files are found by discovery (see passes/form.py)."""
