"""Benchmarks against verified peers, in a checkout: `python -m bench --help`."""
