"""Checkpoints in the native and in Hugging Face formats."""
