"""The server: nginx, supervisor, worker processes, page and client."""
