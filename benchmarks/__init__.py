"""Benchmarks of training, search, serving and start, as ratios to what a user would run instead."""
