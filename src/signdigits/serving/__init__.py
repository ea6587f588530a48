"""The parts of an endpoint: the front, its page, and the processes behind it."""
