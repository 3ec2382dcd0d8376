"""Own importers of ATen operators into Relax, one file per family."""
