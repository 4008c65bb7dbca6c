"""Benchmarks of training steps, text generation and data preparation."""
