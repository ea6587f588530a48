"""Corrections: photographs that visitors send with the label that the model should have given, kept for `review`.

FOLDER/pending/LABEL/ID.jpeg      the photograph, as sent; the id is a digest of label and content. LABEL is not-a-sign for
                                  one that shows none of the classes
FOLDER/pending/LABEL/ID.json      the model's answer, its version and the time
"""

import asyncio
import base64
import datetime
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from starlette.requests import Request
from starlette.responses import Response

from signdigits.data.folders import NO_SIGN
from signdigits.files import atomic_file
from signdigits.serving.admission import make_error
from signdigits.serving.version import Version
from signdigits.serving.versions import Versions

log = logging.getLogger(__name__)

PENDING = "pending"

FULL = make_error(507, "TEMPORARILY_UNAVAILABLE", "no room for more corrections; they wait for a review")
NOT_KEPT = make_error(500, "INTERNAL_ERROR", "the correction could not be kept; the server's log says why")
MALFORMED = make_error(400, "BAD_REQUEST", 'send {"image": BASE64, "label": LABEL}; LABEL is a class, or null for none')


class Corrections:
    """The route /corrections: a POST with `image`, base64 text, and `label`, one of the model's classes, or null for none."""

    def __init__(self, versions: Versions, folder: Path, limit: int) -> None:
        self.versions, self.folder, self.limit = versions, folder, limit

    async def reply(self, request: Request, body: bytes) -> Response:
        live = self.versions.live
        try:
            correction = json.loads(body)
            image, label = str(correction["image"]), correction["label"]
            label = None if label is None else str(label)  # 6 is the class "6"
        except (ValueError, KeyError, TypeError, RecursionError):
            return MALFORMED
        if label is not None and label not in live.class_names:
            known = ", ".join(live.class_names)
            return make_error(400, "BAD_REQUEST", f"no such label; send one of {known}, or null for none of them")
        try:
            return await asyncio.to_thread(self.keep, live, image, NO_SIGN if label is None else label)
        except MlflowException as error:
            return make_error(400, "BAD_REQUEST", error.message[:500])
        except OSError as error:
            log.warning("corrections=%s: %s", self.folder, error)
            return NOT_KEPT

    def keep(self, live: Version, image: str, label: str) -> Response:
        """Keep a photograph with its label and the model's answer. Raises MlflowException for no image, OSError."""
        answer = live.predict(pd.DataFrame({"image": [image]})).iloc[0]
        content = base64.b64decode(image.partition(",")[2] or image)  # without the head of a data URL
        kept = sum(path.stat().st_size for path in (self.folder / PENDING).rglob("*") if path.is_file())
        if kept + len(content) > self.limit:
            return FULL
        suffix = live.python_model.images.open_image(content).format.lower()
        digest = hashlib.sha256(label.encode() + b"\0" + content).hexdigest()[:16]
        target = self.folder / PENDING / label / f"{digest}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": live.number,
            "label": label,
            "prediction": answer["label"],
            "probability": round(float(answer["probability"]), 6),
        }
        for path, data in ((target.with_suffix(".json"), json.dumps(facts).encode()), (target, content)):
            with atomic_file(path) as partial_file:
                partial_file.write_bytes(data)
        return Response(status_code=204)


def count_pending(folder: Path) -> int:
    """Return the number of corrections that wait for a review."""
    return sum(1 for _ in folder.glob(f"{PENDING}/*/*.json"))
