"""Benchmarks of whole training steps, of generation and of the data pipeline."""
