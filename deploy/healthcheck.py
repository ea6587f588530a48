"""The image's HEALTHCHECK: exits with 0 if the container's server is ready, by asking its /health.

Port and certificate are options of the container's first process; no token is needed.
"""

import http.client
import ssl
import sys
from itertools import pairwise
from pathlib import Path

words = Path("/proc/1/cmdline").read_text().split("\0")
options = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
port = int(options.get("--port", 5001))
if options.get("--certificate"):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # of the host's name, not of this address
    connection: http.client.HTTPConnection = http.client.HTTPSConnection("127.0.0.1", port, timeout=4, context=context)
else:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
connection.request("GET", "/health")
sys.exit(connection.getresponse().status != 200)
