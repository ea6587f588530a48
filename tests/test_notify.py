"""Notifications, to a real server."""

import http.server
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from signdigits import notify as notifications
from signdigits.notify import notify

from .conftest import free_port


class Listener(http.server.BaseHTTPRequestHandler):
    heard: list[tuple[str, dict[str, str]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((self.headers.get("Authorization", ""), json.loads(body)))
        self.send_response(503 if len(self.heard) == 1 else 204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Listener.heard = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook?key=secret"
        server.shutdown()


def test_event_is_posted_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notifications.TOKEN, "Open-Sesame")
    notify(url, "promotion", "version 2 replaces version 1", {"version": "2"})
    assert len(Listener.heard) == 2  # the first reply is 503
    expected = {"event": "promotion", "text": "version 2 replaces version 1", "version": "2"}
    assert Listener.heard[1] == ("Bearer Open-Sesame", expected)


def test_failure_is_logged_without_secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(notifications, "ATTEMPTS", 1)
    with caplog.at_level(logging.WARNING):
        notify(f"http://127.0.0.1:{free_port()}/secret", "drift", "3 columns have drifted", {})
    assert "127.0.0.1 was not notified of: 3 columns have drifted" in caplog.text
    assert "secret" not in caplog.text
