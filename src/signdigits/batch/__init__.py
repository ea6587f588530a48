"""Batch prediction: its input, its scoring and its output."""
