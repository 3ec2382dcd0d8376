"""Benchmarks: this tool's artifacts against the engines a user could pick instead.

``python -m benchmarks`` times every workload, and writes benchmarks/results/, docs/performance.md
and the plots of docs/images/.
"""
