"""The client of `scripts/ask`, where no server replies; tests/test_pyfunc_model.py asks one."""

import urllib.request
from pathlib import Path

import pytest

from signdigits.serving import client

from .conftest import free_port


@pytest.mark.parametrize(
    ("host", "proxied"),
    [("127.0.0.1", False), ("localhost", False), ("[::1]", False), ("hands.example", True), ("10.1.2.3:5001", True)],
)
def test_message_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str, proxied: bool
) -> None:
    """Without its password; the loopback network is asked directly."""
    port = free_port()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}")  # from now on it knows the proxies of this moment: none
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    url = f"http://{host}" if proxied else f"http://{host}:{port}"
    assert client.main(["--url", url, str(Path(__file__))]) == 2
    message = capsys.readouterr().err
    assert f"{url}/invocations does not reply" in message
    assert (f"through the proxy http://127.0.0.1:{port} (http_proxy; for a direct request, add" in message) == proxied
    assert "secret" not in message
