"""Checkpoints in the native format and in that of Hugging Face."""
