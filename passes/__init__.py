"""What attention is in a graph and how it is changed. Imports torch, never tvm.

The package itself imports nothing heavy, so that ``passes.errors`` can be used by a
process that only runs a compiled artifact.
"""
