"""Forms of linear layers, one file each; found by discovery (passes/linear_form.py)."""
