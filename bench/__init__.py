"""Benchmarks: run from a checkout, `pytest bench --benchmark-only` or `python -m bench.overhead`."""
