"""The endpoint: page, limits, versions and the processes that answer."""
