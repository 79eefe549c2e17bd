"""Measured side by side with the peers, in one interleaved run. `python -m benchmarks --help`."""
