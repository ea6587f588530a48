"""The files in deploy/: they match the schemas of Kubernetes and Compose, the pins and the server's options."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from signdigits.cli import make_parser
from signdigits.errors import UsageError
from signdigits.serving.options import ServeParameters, read_token

from .conftest import PROJECT

DEPLOY = PROJECT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==([^ ;\n]+)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def endpoint_container() -> Any:
    return load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_manifest_matches_kubernetes_schema(path: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra .[deploy]")
    kubernetes_validate.validate(load(path), kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_kustomization_names_every_file(path: Path) -> None:
    kustomization = load(path)
    named = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]
    files = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
    assert {name for name in named if not name.startswith("..")} == files
    assert all((path.parent / name).exists() for name in named)


def test_patches_name_objects_of_base() -> None:
    overlay = KUBERNETES / "overlays" / "alias"
    for patch in load(overlay / "kustomization.yaml")["patches"]:
        patched, original = load(overlay / patch["path"]), load(KUBERNETES / "base" / patch["path"])
        assert patched["kind"] == original["kind"]
        assert patched["metadata"]["name"] == original["metadata"]["name"]
    containers = load(overlay / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    assert [container["name"] for container in containers] == [endpoint_container()["name"]]


def test_compose_file_matches_schema() -> None:
    pytest.importorskip("check_jsonschema", reason="needs the extra .[deploy]")
    line = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DEPLOY / "compose.yaml"),
    ]
    checked = subprocess.run(line, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_image_has_pinned_versions() -> None:
    pins, image = read_pins(PROJECT / "requirements.txt"), read_pins(DEPLOY / "requirements.txt")
    listed = (DEPLOY / "requirements.in").read_text()
    named = {name.replace("_", "-") for name in re.findall(r"^[\w-]+", listed, re.MULTILINE)}
    assert named <= set(image)
    assert image["mlflow-skinny"] == pins["mlflow"]
    shared = set(pins) & set(image)
    assert {name: image[name] for name in shared} == {name: pins[name] for name in shared}
    assert not {"tensorflow", "keras"} & set(image)


def test_declared_options_parse() -> None:
    entrypoints = re.findall(r"^ENTRYPOINT (\[.*?\])", (DEPLOY / "Containerfile").read_text().replace("\\\n", ""), re.M)
    arguments = [endpoint_container()["args"], load(DEPLOY / "compose.yaml")["services"]["endpoint"]["command"]]
    for entrypoint in entrypoints:
        for more in arguments:
            options = vars(make_parser().parse_args([*json.loads(entrypoint)[3:], *more]))
            assert options["host"] == "0.0.0.0"
            assert options["token_file"]


def test_deployment_fits_image() -> None:
    container = (DEPLOY / "Containerfile").read_text()
    specification = load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    user = specification["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in container
    assert f"EXPOSE {ServeParameters().port}" in container
    assert endpoint_container()["ports"][0]["containerPort"] == ServeParameters().port
    drain = float(endpoint_container()["args"][-1])
    pause = endpoint_container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert specification["terminationGracePeriodSeconds"] >= pause + drain


def test_placeholder_token_is_refused(tmp_path: Path) -> None:
    placeholder = load(KUBERNETES / "base" / "secret.yaml")["stringData"]["token"]
    (tmp_path / "token").write_text(placeholder)
    with pytest.raises(UsageError, match="must have 16 or more"):
        read_token(str(tmp_path / "token"))
