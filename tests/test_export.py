import json
import sys
from pathlib import Path

import mlflow
import pytest

from signdigits import export
from signdigits.config import EXPORT_FORMATS, SERVED_MODEL, ExportParameters
from signdigits.errors import DataError, ModelError
from signdigits.tracking import registry, runs

pytestmark = pytest.mark.slow


def test_formats_match_parameter() -> None:
    assert tuple(export.SUFFIXES) == EXPORT_FORMATS


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_exported_network_gives_served_answers(champion: str, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("tf2onnx", reason="needs the extra .[export]")
    comparison = export.export(ExportParameters(format=format))
    assert comparison.images == 12
    assert comparison.largest_difference < (0.1 if format == "tflite-int8" else 1e-5)
    assert comparison.equal_labels == 1
    file, settings = Path("exported", f"network-1{export.SUFFIXES[format]}"), Path("exported", "network-1.json")
    assert {file, settings} == set(Path("exported").iterdir())
    assert json.loads(settings.read_text())["class_names"] == ["0", "1", "2"]
    (run,) = runs.search_runs("tags.role = 'export'")
    assert run.data.metrics["bytes"] == file.stat().st_size
    assert [item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)] == [file.name]


def test_input_example_replaces_missing_photographs(champion: str, caplog: pytest.LogCaptureFixture) -> None:
    model = registry.find_model("", SERVED_MODEL)
    mlflow.set_logged_model_tags(model.model_id, {"data": "/not/here"})
    assert export.export(ExportParameters(format="keras")).images == 1
    assert "/not/here: no such folder" in caplog.text
    with pytest.raises(DataError, match="/not/here: no such folder"):
        export.export(ExportParameters(format="tflite-int8"))


def test_missing_converter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ModelError, match=r"format=onnx: needs tf2onnx .*\.\[export\].* --env-manager uv"):
        export.export(ExportParameters(format="onnx"))
