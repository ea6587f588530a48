"""The network, and what it is fed with."""
