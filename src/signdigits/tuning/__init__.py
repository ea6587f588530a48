"""The search: its objective, its study, who runs the trials, and where they are stored."""
