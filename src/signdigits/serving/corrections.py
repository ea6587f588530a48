"""Corrections: photographs that visitors send with the label that the model should have given, kept for `review`.

FOLDER/pending/LABEL/ID.jpeg      the photograph, as sent; the id is a digest of label and content
FOLDER/pending/LABEL/ID.json      the model's answer, its version and the time
"""

import asyncio
import base64
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from starlette.requests import Request
from starlette.responses import Response

from signdigits.files import atomic_file
from signdigits.serving.admission import make_error
from signdigits.serving.invocation import INTERNAL, Invocation, invocation_variable

PENDING = "pending"


class CorrectionsFull(Exception):
    """The folder holds as much as it may."""


class Corrections:
    """The route /corrections of a worker: a POST with `image`, base64 text, and `label`, one of the model's classes."""

    def __init__(self, model: PyFuncModel, version: str, folder: Path, limit: int) -> None:
        self.model, self.version = model, version
        self.python_model = model.unwrap_python_model()
        self.invocation = invocation_variable(model)
        self.folder, self.limit = folder, limit

    async def reply(self, request: Request) -> Response:
        try:
            correction = json.loads(await request.body())
            image, label = str(correction["image"]), str(correction["label"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return make_error(400, "BAD_REQUEST", 'send {"image": BASE64, "label": LABEL}')
        if label not in self.python_model.class_names:
            return make_error(
                400, "BAD_REQUEST", f"no such label; send one of {', '.join(self.python_model.class_names)}"
            )
        try:
            await asyncio.to_thread(self.keep, image, label)
        except MlflowException as error:
            return make_error(400, "BAD_REQUEST", error.message[:500])
        except CorrectionsFull:
            return make_error(503, "TEMPORARILY_UNAVAILABLE", "no room for more corrections; they wait for a review")
        return Response(status_code=204)

    def keep(self, image: str, label: str) -> None:
        """Keep a photograph with its label and the model's answer. Raises CorrectionsFull; MlflowException for no image."""
        self.invocation.set(Invocation(INTERNAL))
        answer = self.model.predict(pd.DataFrame({"image": [image]})).iloc[0]
        content = base64.b64decode(image.partition(",")[2] or image)  # without the head of a data URL
        if _measure(self.folder / PENDING) + len(content) > self.limit:
            raise CorrectionsFull
        suffix = self.python_model.images.open_image(content).format.lower()
        digest = hashlib.sha256(label.encode() + b"\0" + content).hexdigest()[:16]
        target = self.folder / PENDING / label / f"{digest}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": self.version,
            "label": label,
            "prediction": answer["label"],
            "probability": round(float(answer["probability"]), 6),
        }
        for path, data in ((target.with_suffix(".json"), json.dumps(facts).encode()), (target, content)):
            with atomic_file(path) as partial_file:
                partial_file.write_bytes(data)


def _measure(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
