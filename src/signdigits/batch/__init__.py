"""Many photographs read by the served model: which, by whom, and where the answers go."""
