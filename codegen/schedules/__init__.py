"""One schedule rule per file, each with `RULE = Rule(...)`; found by discovery."""
