"""Promotion: compare a challenger with the champion, and describe a version."""
