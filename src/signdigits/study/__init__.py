"""The parts of a search: trials, who runs them, where they are kept."""
