"""Evaluation: perplexity, in-context learning, tasks."""
