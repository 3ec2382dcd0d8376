"""Rewrites of the Relax graph before kernels are lowered."""
