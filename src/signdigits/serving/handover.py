"""The handover of a listening socket from a running server to a new one: no connection is refused or reset.

The running server offers its socket to processes of the same user, at an abstract Unix address (Linux) that names its own
address; the new one takes it, and says when it answers requests, upon which the old one stops.
"""

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
import time

AVAILABLE = sys.platform == "linux"
RETRY_INTERVAL = 0.5  # seconds


def take_socket(address: str) -> tuple[socket.socket, socket.socket] | None:
    """Return the listening socket of a server at `address` and the connection to it, if there is one that offers it."""
    if not AVAILABLE:
        return None
    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(5)
        server.connect(_offer_address(address))
        _, descriptors, _, _ = socket.recv_fds(server, 1, 1)
        return socket.socket(fileno=descriptors[0]), server
    except (OSError, IndexError):
        server.close()
        return None


def offer_socket(address: str, listening: socket.socket) -> None:
    """Offer the socket, in a thread, until a new server has taken it; then stop this process."""
    if AVAILABLE:
        threading.Thread(target=_offer, args=(address, listening), daemon=True).start()


def _offer(address: str, listening: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as offering:
        while True:
            try:
                offering.bind(_offer_address(address))
                break
            except OSError:  # the old server has not gone yet
                time.sleep(RETRY_INTERVAL)
        offering.listen(1)
        while True:
            peer, _ = offering.accept()
            with peer, contextlib.suppress(OSError):
                if _user_of(peer) == os.geteuid():
                    socket.send_fds(peer, [b"."], [listening.fileno()])
                    if peer.recv(1):  # the new server answers; nothing if it has failed
                        break
    signal.raise_signal(signal.SIGTERM)


def _offer_address(address: str) -> str:
    return f"\0sign-digits-{os.geteuid()}-{address}"


def _user_of(peer: socket.socket) -> int:
    """Return the user of the process at the other end: every user of the machine can connect."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
