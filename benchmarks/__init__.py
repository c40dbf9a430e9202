"""Benchmarks: `python -m benchmarks NAME` runs one, prints it, and writes its numbers with `--json FILE`."""
