"""Mutated requests: broken JSON, base64, photographs and headers."""

import base64
import contextlib
import http.client
import io
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

NO_REPLY, CLOSED = 0, -1  # in place of a status: none came; the client went away before it had sent all
TRACES = (b"Traceback", b"stack_trace", b'File "')
KEYS = ("dataframe_records", "dataframe_split", "inputs", "instances", "params", "prompt", "image", "data", "columns")


@dataclass(frozen=True)
class Request:
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


@dataclass
class Tally:
    """What was answered, how often, and the faults among it."""

    statuses: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, request: Request, status: int, content: bytes) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        told = status < 400 or content.startswith(b'{"error_code"')
        # An error may tell back what was sent, and Hypothesis finds these very words in the code that it tests.
        traced = any(trace in content and trace not in request.body for trace in TRACES)
        if status >= 500 or status == NO_REPLY or not told or traced:
            sent = f"{str(request.headers)[:300]} {request.body[:300]!r}"
            self.faults.append(f"{status} {content[:300]!r} to {sent}")


def pictures() -> list[bytes]:
    """A small photograph in each format that is taken, and in one that is not."""
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    found = []
    for form, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("GIF", "P")):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, form)
        found.append(buffer.getvalue())
    return found


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which some are changed, cut off, doubled or put in."""
    content = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(("change", "cut", "remove", "double", "insert"))):
            case "change" if content:
                content[place] = draw(st.integers(0, 255))
            case "cut":
                del content[place:]
            case "remove":
                del content[place : place + draw(st.integers(1, 40))]
            case "double":
                content[place:place] = content[place : place + 200]
            case _:
                content[place:place] = draw(st.binary(max_size=8))
    return bytes(content)


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def table(image: Any) -> bytes:
    return json.dumps({"dataframe_records": [{"image": image}]}).encode()


def requests() -> st.SearchStrategy[Request]:
    photograph = st.sampled_from(pictures())
    key = st.sampled_from(KEYS) | st.text(max_size=5)
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | photograph.map(text_of)
    tree = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(key, inner, max_size=4), max_leaves=12
    )
    good = photograph.map(lambda content: table(text_of(content)))
    deep = st.builds(lambda opening, times: opening * times, st.sampled_from([b"[", b'{"a":']), st.integers(1, 200_000))
    number = st.integers(1, 20_000).map(lambda digits: b'{"dataframe_records": [{"image": ' + b"9" * digits + b"}]}")
    split = st.dictionaries(st.sampled_from(("columns", "data", "index")), tree).map(
        lambda made: {"dataframe_split": made}
    )
    one = st.tuples(st.sampled_from(KEYS[:5]), tree).map(lambda pair: {pair[0]: pair[1]})
    bodies = st.one_of(
        damaged(photograph).map(lambda content: table(text_of(content))),
        damaged(photograph.map(lambda content: text_of(content).encode())).map(
            lambda text: table(text.decode("latin-1"))
        ),
        damaged(good),
        st.binary(max_size=200),
        (tree | split | one).map(lambda made: json.dumps(made).encode()),
        tree.map(table),
        deep,
        number,
    )
    return st.builds(Request, bodies) | st.builds(Request, good | bodies, headers())


def headers() -> st.SearchStrategy[dict[str, str]]:
    """Headers that are wrong, long, double or missing."""
    letters = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
    value = st.text(letters, max_size=40).map(str.strip) | st.integers(1, 40_000).map(lambda length: "a" * length)
    kind = st.sampled_from(
        ("application/json", "application/json; charset=utf-8", "application/json;", "application/json; charset=latin-1",
         "text/csv", "application/vnd.apache.parquet", "multipart/form-data; boundary=x", "", "?")
    )  # fmt: skip
    name = st.sampled_from(
        ("Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Encoding", "Cookie", "Expect", "Host",
         "Model-Version", "Range", "Transfer-Encoding", "TE", "Upgrade", "X-Forwarded-For", "X-HTTP-Method-Override")
    )  # fmt: skip
    wrong_length = st.integers(-5, 5000).map(str)
    return st.fixed_dictionaries(
        {"Content-Type": st.just("application/json") | kind}, optional={"Content-Length": wrong_length}
    ).flatmap(lambda made: st.dictionaries(name, value, max_size=3).map(lambda more: {**made, **more}))


def send(port: int, request: Request) -> tuple[int, bytes]:
    """Status and content of the reply, or one of the two numbers above."""
    promised = request.headers.get("Content-Length", "")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=70)) as connection:
        with contextlib.suppress(OSError):  # refused before all was sent: the reply says why
            connection.request("POST", "/invocations", request.body, request.headers)
        if promised.isdigit() and int(promised) > len(request.body):
            return CLOSED, b""
        try:
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException) as error:
            return NO_REPLY, repr(error).encode()


def bombard(port: int, count: int) -> Tally:
    """Send so many requests, the same ones every time, and tally the replies."""
    tally = Tally()

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def ask(request: Request) -> None:
        tally.add(request, *send(port, request))

    ask()
    return tally
