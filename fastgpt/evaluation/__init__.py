"""Evaluation: perplexity, learning in context, tasks."""
