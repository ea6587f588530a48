"""The files in deploy/: what kustomize and Compose build of them fits Kubernetes, the image and the options of this project."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from signdigits.cli import parse_arguments
from signdigits.errors import UsageError
from signdigits.serving.options import ServeParameters, read_token

from .conftest import PROJECT, answers, free_port, wait_until

DEPLOY = PROJECT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").iterdir())

# The combinations of docs/deploy.md: an overlay and its components.
BUILDS = {
    "baked": ("baked",),
    "baked-everything": ("baked", "ingress", "monitoring", "feedback"),
    "alias": ("alias",),
    "alias-ingress": ("alias", "ingress"),
    "alias-monitoring": ("alias", "monitoring"),
    "alias-feedback": ("alias", "feedback"),
    "alias-shadow": ("alias", "shadow"),
    "alias-store": ("alias", "store"),
    "alias-loop": ("alias", "feedback", "loop"),
    "platform": ("platform",),
}
TAGS = {
    "1": "baked",
    "follow": "endpoint",
    "training": "training",
    "tracking": "tracking",
}  # and the stages of the image
STRANGER: dict[str, str] = {}  # the labels of any other pod, such as Prometheus

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
every_build = pytest.mark.parametrize("build", BUILDS)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==([^ ;\n]+)", path.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


@functools.cache
def build_objects(build: str) -> list[Any]:
    """Return the objects that kustomize builds, each with its kind and name."""
    overlay, *components = BUILDS[build]
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.relpath(KUBERNETES, Path(folder).resolve())
        kustomization = {
            "resources": [f"{here}/overlays/{overlay}"],
            "components": [f"{here}/components/{name}" for name in components],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    return list(yaml.safe_load_all(built.stdout))


def find(build: str, *kinds: str) -> dict[str, Any]:
    """Return the objects of some kinds by their names."""
    return {item["metadata"]["name"]: item for item in build_objects(build) if item["kind"] in kinds}


def list_pods(build: str) -> dict[str, Any]:
    """Return the pod templates by the names of what creates them."""
    pods = {name: item["spec"]["template"] for name, item in find(build, "Deployment", "StatefulSet").items()}
    return pods | {
        name: item["spec"]["jobTemplate"]["spec"]["template"] for name, item in find(build, "CronJob").items()
    }


def find_container(build: str, pod: str, name: str) -> Any:
    (found,) = (item for item in list_pods(build)[pod]["spec"]["containers"] if item["name"] == name)
    return found


def selects(selector: Any, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "no expressions"
    return selector.get("matchLabels", {}).items() <= labels.items()


def select_pods(build: str, selector: Any) -> list[Any]:
    return [pod["spec"] for pod in list_pods(build).values() if selects(selector, pod["metadata"]["labels"])]


def list_ports(pods: list[Any]) -> dict[str, int]:
    containers = [container for pod in pods for container in pod["containers"]]
    return {port["name"]: port["containerPort"] for item in containers for port in item.get("ports", [])}


@functools.cache
def schema_errors(document: str) -> str:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra .[deploy]")
    try:
        kubernetes_validate.validate(json.loads(document), kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{error.path}: {error.message}"
    return ""


@needs_kubectl
@every_build
def test_objects_match_kubernetes_schema(build: str) -> None:
    for item in build_objects(build):
        if not item["apiVersion"].startswith("monitoring.coreos.com/"):  # not of Kubernetes itself
            assert schema_errors(json.dumps(item, sort_keys=True)) == "", f"{item['kind']} {item['metadata']['name']}"


@needs_kubectl
@every_build
def test_names_are_unique_and_without_namespace(build: str) -> None:
    objects = build_objects(build)
    names = [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)
    assert not [name for item, name in zip(objects, names, strict=True) if "namespace" in item["metadata"]]


@needs_kubectl
@every_build
def test_selectors_select(build: str) -> None:
    for name, service in find(build, "Service").items():
        pods = select_pods(build, {"matchLabels": service["spec"]["selector"]})
        assert len(pods) == 1, name
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(list_ports(pods))
    for name, item in find(build, "Deployment", "StatefulSet").items():
        assert selects(item["spec"]["selector"], item["spec"]["template"]["metadata"]["labels"]), name
        assert item["spec"].get("serviceName", name) in find(build, "Service") | {name: None}
    for item in find(build, "PodDisruptionBudget").values():
        assert len(select_pods(build, item["spec"]["selector"])) == 1
    for item in find(build, "HorizontalPodAutoscaler").values():
        assert item["spec"]["scaleTargetRef"]["name"] in find(build, item["spec"]["scaleTargetRef"]["kind"])
    for name, policy in find(build, "NetworkPolicy").items():
        pods = select_pods(build, policy["spec"]["podSelector"])
        assert pods, name
        rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        for peer in (peer for rule in rules for peer in [*rule.get("from", []), *rule.get("to", [])]):
            assert select_pods(build, peer["podSelector"]), f"{name}: {peer}"
        for port in (port["port"] for rule in policy["spec"].get("ingress", []) for port in rule["ports"]):
            assert port in list_ports(pods).values(), name


@needs_kubectl
@every_build
def test_references_exist(build: str) -> None:
    """Each Secret, ConfigMap, key and claim is in the build or the operator's, each mounted volume and probed port in the pod."""
    for name, pod in list_pods(build).items():
        specification = pod["spec"]
        volumes = {volume["name"]: volume for volume in specification["volumes"]}
        claims = find(build, "StatefulSet").get(name, {"spec": {}})["spec"].get("volumeClaimTemplates", [])
        for volume in volumes.values():
            if "secret" in volume:
                used = {item["key"] for item in volume["secret"]["items"]}
                assert used <= keys(build, "Secret", volume["secret"]["secretName"])
            if "configMap" in volume:
                assert keys(build, "ConfigMap", volume["configMap"]["name"])
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in find(build, "PersistentVolumeClaim")
        for container in specification["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= volumes.keys() | {claim["metadata"]["name"] for claim in claims}
            for source in container.get("envFrom", []):
                assert keys(build, "Secret", source["secretRef"]["name"])
            sources = [variable["valueFrom"] for variable in container.get("env", []) if "valueFrom" in variable]
            for reference in (source["secretKeyRef"] for source in sources):
                assert reference.get("optional") or reference["key"] in keys(build, "Secret", reference["name"])
            probes = [probe for probe in container if probe.endswith("Probe") and "httpGet" in container[probe]]
            assert all(container[probe]["httpGet"]["port"] in list_ports([specification]) for probe in probes)


def keys(build: str, kind: str, name: str) -> set[str]:
    found = find(build, kind)[name]
    return {*found.get("data", {}), *found.get("stringData", {})}


@needs_kubectl
@every_build
def test_pods_are_restricted(build: str) -> None:
    """Every pod fits the Pod Security Standard `restricted`, with a read-only root file system."""
    for name, pod in list_pods(build).items():
        shared = pod["spec"]["securityContext"]
        assert shared["runAsNonRoot"]
        assert shared["runAsUser"]
        assert shared["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        for container in pod["spec"]["containers"]:
            own = container["securityContext"]
            assert own == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {*container["resources"]["requests"], *container["resources"]["limits"]} == {"cpu", "memory"}


@needs_kubectl
@every_build
def test_images_are_built_or_composes(build: str) -> None:
    stages = list_stages()
    shared = {service["image"] for service in load(DEPLOY / "compose.yaml")["services"].values()}
    for container in (item for pod in list_pods(build).values() for item in pod["spec"]["containers"]):
        name, _, tag = container["image"].rpartition(":")
        if name == "registry.example/sign-digits":
            assert TAGS[tag] in stages
        else:
            assert container["image"] in shared


def list_stages() -> dict[str, list[str]]:
    """Return the entrypoints of the image's stages."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    stages: dict[str, list[str]] = {}
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        first, _, name = stage.partition("\n")[0].partition(" AS ")
        own = re.findall(r"^ENTRYPOINT (\[.*?\])", stage, re.MULTILINE)
        stages[name] = json.loads(own[-1]) if own else stages.get(first, [])
    return stages


def serve_parameters(stage: str, options: list[str]) -> ServeParameters:
    """Return what the image's entrypoint makes of the options. Raises UsageError, as it would."""
    line = [*list_stages()[stage][3:], *options]
    return ServeParameters(**{name: value for name, value in parse_arguments(line).items() if name != "command"})


@needs_kubectl
@every_build
def test_options_of_endpoint_parse(build: str) -> None:
    container = find_container(build, "sign-digits", "endpoint")
    parameters = serve_parameters(TAGS[container["image"].rpartition(":")[2]], container["args"])
    assert parameters.host == "0.0.0.0"
    assert str(Path(parameters.token_file).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    has = {*BUILDS[build], *(list_components() if build == "platform" else ())}
    assert bool(parameters.trusted_proxy) == ("ingress" in has)
    assert bool(parameters.shadow) == ("shadow" in has)
    assert parameters.wait_for_version == ("baked" not in has)
    folder = "/var/lib/sign-digits/feedback"
    logged = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    assert parameters.corrections == (f"{folder}/corrections" if "feedback" in has else "")
    assert logged == ({"SIGN_DIGITS_PREDICTION_LOG": f"{folder}/prediction_log"} if "feedback" in has else {})
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    pod = list_pods(build)["sign-digits"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= pause + parameters.drain_timeout
    assert container["ports"][0]["containerPort"] == parameters.port
    assert f"USER {pod['securityContext']['runAsUser']}:" in (DEPLOY / "Containerfile").read_text()


def list_components() -> list[str]:
    return [Path(path).name for path in load(KUBERNETES / "overlays" / "platform" / "kustomization.yaml")["components"]]


def test_platform_has_every_component() -> None:
    assert sorted(list_components()) == sorted(path.name for path in (KUBERNETES / "components").iterdir())
    assert set(list_components()) == {name for build in BUILDS.values() for name in build[1:]}


def test_shadow_needs_overlay_alias() -> None:
    with pytest.raises(UsageError, match="needs the supervisor"):
        serve_parameters("baked", ["--shadow", "challenger"])


def test_every_file_is_built() -> None:
    for folder in (path.parent for path in KUBERNETES.rglob("kustomization.yaml")):
        kustomization = load(folder / "kustomization.yaml")
        generated = [file for item in kustomization.get("configMapGenerator", []) for file in item["files"]]
        patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
        named = {*kustomization.get("resources", []), *patches, *(file.rpartition("=")[2] for file in generated)}
        files = {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
        assert {name for name in named if not name.startswith("..")} == files


@needs_kubectl
def test_loop_reads_what_endpoint_writes() -> None:
    for build in ("alias-loop", "platform"):
        loop = find_container(build, "sign-digits-loop", "loop")
        endpoint = find_container(build, "sign-digits", "endpoint")
        check_loop_options(loop["args"])
        given = {variable["name"]: variable.get("value", "") for variable in loop["env"]}
        assert given["PREDICTION_LOG"] == endpoint["env"][0]["value"]
        assert given["CORRECTIONS"] in endpoint["args"]
        check_variables(given)
        folders = {mount["mountPath"] for mount in loop["volumeMounts"]}
        assert folders == {"/tmp", "/var/lib/sign-digits/home", "/var/lib/sign-digits/feedback"}
        assert loop["envFrom"] == endpoint["envFrom"], "both have one tracking server"


def check_loop_options(arguments: list[str]) -> None:
    """Assert that scripts/loop passes on what `main` takes."""
    data, *options = arguments
    assert parse_arguments(["main", "--data", data, *options])["data"] == data


def check_variables(names: Any) -> None:
    script = (PROJECT / "scripts" / "loop").read_text()
    assert all(re.search(rf"\${{{name}\b", script) for name in names)


@needs_kubectl
@pytest.mark.parametrize("build", ["alias-store", "platform"])
def test_tracking_server_is_the_stores(build: str) -> None:
    uri = find(build, "Secret")["sign-digits-tracking"]["stringData"]["MLFLOW_TRACKING_URI"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", uri).groups()  # type: ignore[union-attr]
    service = find(build, "Service")[host]["spec"]
    assert service["ports"][0]["port"] == int(port)
    server = find_container(build, host, "mlflow")
    assert {f"{host}:{port}", f"localhost:{port}"} <= set(option(server["args"], "allowed-hosts").split(","))
    database = find_container(build, "postgres", "postgres")["env"]
    values = {variable["name"]: variable.get("value") for variable in database}
    assert option(server["args"], "backend-store-uri") == (
        f"postgresql://{values['POSTGRES_USER']}@postgres/{values['POSTGRES_DB']}"
    )
    composed = shlex.split(load(DEPLOY / "compose.yaml")["services"]["mlflow"]["command"])
    assert server["command"] == composed[:2]
    settings = {variable["name"]: variable.get("value") for variable in server["env"]}
    given = load(DEPLOY / "compose.yaml")["services"]["mlflow"]["environment"]
    assert settings.items() >= {name: value for name, value in given.items() if name.startswith("MLFLOW_")}.items()
    shared = ("port", "workers", "backend-store-uri", "artifacts-destination")
    assert [option(server["args"], name) for name in shared] == [
        composed[composed.index(f"--{name}") + 1] for name in shared
    ]
    assert list_pods(build)[host]["spec"]["hostAliases"] == [{"ip": "127.0.0.1", "hostnames": ["mlflow"]}]
    assert "server mlflow:5000 " in find(build, "ConfigMap")[conf_name(build)]["data"]["nginx.conf"]


def option(arguments: list[str], name: str) -> str:
    (found,) = (text for text in arguments if text.startswith(f"--{name}="))
    return found.partition("=")[2]


def conf_name(build: str) -> str:
    volumes = list_pods(build)["tracking"]["spec"]["volumes"]
    return next(str(volume["configMap"]["name"]) for volume in volumes if "configMap" in volume)


def permits(build: str, direction: str, labels: dict[str, str], peer: dict[str, str] | None, port: int) -> bool:
    """Tell whether the policies let a pod connect (Egress), or be connected to; a peer without labels is no pod."""
    kind = "to" if direction == "Egress" else "from"
    policies = [item["spec"] for item in find(build, "NetworkPolicy").values()]
    relevant = [
        policy for policy in policies if direction in policy["policyTypes"] and selects(policy["podSelector"], labels)
    ]
    rules = [rule for policy in relevant for rule in policy.get(direction.lower(), [])]

    def fits(rule: Any) -> bool:
        is_peer = not rule.get(kind) or (
            peer is not None and any(selects(item["podSelector"], peer) for item in rule[kind])
        )
        return is_peer and any((item["protocol"], item["port"]) == ("TCP", port) for item in rule["ports"])

    return not relevant or any(map(fits, rules))


@needs_kubectl
def test_network_policies_permit_what_is_needed() -> None:
    build = "platform"
    pods = {name: pod["metadata"]["labels"] for name, pod in list_pods(build).items()} | {"stranger": STRANGER}
    permitted = {
        (client, server, port)
        for client, labels in pods.items()
        for server, served in pods.items()
        for port in (443, 5000, 5001, 5050, 5432)
        if server != "stranger"
        and permits(build, "Egress", labels, served, port)
        and permits(build, "Ingress", served, labels, port)
    }
    assert permitted == {
        ("stranger", "sign-digits", 5001),
        ("sign-digits", "tracking", 5050),
        ("sign-digits-loop", "tracking", 5050),
        ("tracking", "postgres", 5432),
    }
    assert {name for name, labels in pods.items() if permits(build, "Egress", labels, None, 443)} == {
        "stranger",
        "sign-digits-loop",
    }


@needs_kubectl
def test_endpoint_reaches_tracking_server_elsewhere() -> None:
    for build in ("alias", "baked"):
        labels = list_pods(build)["sign-digits"]["metadata"]["labels"]
        assert permits(build, "Egress", labels, None, 5050) == (build == "alias")
        assert not permits(build, "Egress", labels, None, 443)


@needs_kubectl
@pytest.mark.parametrize("build", ["baked-everything", "platform"])
def test_ingress_and_monitor_find_service(build: str) -> None:
    service = find(build, "Service")["sign-digits"]
    ports = {port["name"] for port in service["spec"]["ports"]}
    (ingress,) = find(build, "Ingress").values()
    for rule in ingress["spec"]["rules"]:
        assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
        backend = rule["http"]["paths"][0]["backend"]["service"]
        assert (backend["name"], backend["port"]["name"] in ports) == ("sign-digits", True)
    assert ingress["spec"]["tls"][0]["secretName"] == "sign-digits-tls", "docs/deploy.md has the operator create it"
    (monitor,) = find(build, "ServiceMonitor").values()
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in ports
    assert endpoint["authorization"]["type"] == "Bearer"
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["key"] in keys(build, "Secret", credentials["name"])
    assert set(endpoint) == {"port", "path", "interval", "authorization"}
    (rule,) = find(build, "PrometheusRule").values()
    assert rule["metadata"]["labels"] == monitor["metadata"]["labels"]
    dashboard = find(build, "ConfigMap")["sign-digits-dashboard"]["data"]
    assert json.loads(dashboard["sign-digits.json"])["panels"]


def test_rules_of_kubernetes_are_those_of_compose() -> None:
    rules = load(KUBERNETES / "components" / "monitoring" / "alerts.yaml")["spec"]
    assert rules == load(DEPLOY / "prometheus" / "alerts.yml"), "indent alerts.yml by two below `spec:`"


def test_rules_name_jobs() -> None:
    """Compose's Prometheus has a name for the job, the operator's has that of the Service."""
    named = set(re.findall(r'job="([^"]*)"', (DEPLOY / "prometheus" / "alerts.yml").read_text()))
    assert named == {job["job_name"] for job in load(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]}
    assert named == {load(KUBERNETES / "base" / "service.yaml")["metadata"]["name"]}


def test_placeholder_token_is_refused(tmp_path: Path) -> None:
    placeholder = load(KUBERNETES / "base" / "secret.yaml")["stringData"]["token"]
    (tmp_path / "token").write_text(placeholder)
    with pytest.raises(UsageError, match="must have 16 or more"):
        read_token(str(tmp_path / "token"))


def configure_compose(**variables: str) -> Any:
    """Return what Docker Compose makes of the file, with all its services."""
    program = shutil.which("docker-compose")
    if not program:
        pytest.skip("needs the extra .[deploy]")
    passwords = {f"{name}_PASSWORD": name.lower() for name in ("POSTGRES", "MLFLOW", "GRAFANA")}
    done = subprocess.run(
        [program, "--env-file", os.devnull, "--file", DEPLOY / "compose.yaml", "--profile", "*", "config", "--format", "json"],
        capture_output=True, text=True, env=os.environ | passwords | variables,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_compose_builds_its_images() -> None:
    services = configure_compose()["services"]
    stages = list_stages()
    for service in services.values():
        name, _, tag = service["image"].partition(":")
        assert tag
        assert (name == "sign-digits") == ("build" in service)
        if "build" in service:
            assert service["build"]["target"] in stages
            assert service["build"]["target"] == tag
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))


def test_compose_options_parse() -> None:
    services = configure_compose(NOTIFY="https://chat.example/hook")["services"]
    parameters = serve_parameters("follow", services["endpoint"]["command"])
    assert parameters.notify == "https://chat.example/hook"
    assert parameters.wait_for_version
    mounted = {volume["target"] for volume in services["endpoint"]["volumes"]}
    assert {str(Path(parameters.corrections).parent)} == mounted
    loop = services["loop"]
    check_loop_options(loop["command"])
    own = {name: value for name, value in loop["environment"].items() if not name.startswith("MLFLOW_")}
    check_variables(own)
    assert own["CORRECTIONS"] == parameters.corrections
    assert own["PREDICTION_LOG"] == services["endpoint"]["environment"]["SIGN_DIGITS_PREDICTION_LOG"]
    assert (
        loop["environment"].items()
        >= {
            name: value for name, value in services["endpoint"]["environment"].items() if name.startswith("MLFLOW_")
        }.items()
    )
    assert serve_parameters("follow", configure_compose()["services"]["endpoint"]["command"]).notify == ""


@pytest.mark.parametrize("url", ["", "https://chat.example/alerts?key=1"])
def test_alerts_have_one_receiver(url: str) -> None:
    alertmanager = yaml.safe_load(configure_compose(ALERTS=url)["configs"]["alertmanager"]["content"])
    assert alertmanager == {
        "route": {"receiver": "webhook"},
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": url}] if url else None}],
    }
    (target,) = load(DEPLOY / "prometheus" / "prometheus.yml")["alerting"]["alertmanagers"][0]["static_configs"]
    assert target["targets"] == ["alertmanager:9093"]


@pytest.fixture
def backend() -> Iterator[int]:
    """A server in the place of MLflow's, which answers with the headers that it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(dict(self.headers)).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_proxy_checks_password(backend: int, tmp_path: Path) -> None:
    if not (nginx := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")):
        pytest.skip("needs nginx")
    port = free_port()
    text = (KUBERNETES / "components" / "store" / "proxy.conf").read_text()
    for old, new in (
        ("/tmp/", f"{tmp_path}/"),
        ("/etc/sign-digits", str(tmp_path)),
        ("mlflow:5000", f"127.0.0.1:{backend}"),
        ("listen 5050", f"listen 127.0.0.1:{port}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    secret = load(KUBERNETES / "components" / "store" / "secret.yaml")["stringData"]["htpasswd"]
    (tmp_path / "htpasswd").write_text(secret.replace("${MLFLOW_PASSWORD}", "right"))

    def ask(path: str, password: str = "") -> tuple[int, Any]:
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, f"http://127.0.0.1:{port}", "sign-digits", password)
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, None

    alone = "daemon off; master_process off;"
    server = subprocess.Popen([nginx, "-e", "stderr", "-c", str(tmp_path / "nginx.conf"), "-g", alone])
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
        assert ask("/health")[0] == 200
        assert ask("/api", "wrong")[0] == 401
        status, headers = ask("/api", "right")
        assert status == 200
        assert "Authorization" not in headers
        assert headers["Host"] == f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The units, with the project in this folder."""
    folder = tmp_path_factory.mktemp("units")
    for unit in UNITS:
        text = unit.read_text().replace("/srv/sign-digits/.venv/bin/python", "/usr/bin/env")
        (folder / unit.name).write_text(text.replace("/srv/sign-digits", str(PROJECT)))
    return sorted(folder.iterdir())


def test_systemd_accepts_units(units: list[Path]) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_services_are_hardened(units: list[Path]) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    for unit in (path for path in units if path.suffix == ".service"):
        checked = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=13", "--no-pager", unit],
            capture_output=True, text=True,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout


def test_options_of_services_parse() -> None:
    sections = {unit.name: unit.read_text() for unit in UNITS}
    server, loop = sections["sign-digits.service"], sections["sign-digits-loop.service"]
    line = shlex.split(re.search(r"^ExecStart=(.*)", server.replace("\\\n", ""), re.MULTILINE)[1])  # type: ignore[index]
    assert line[1:3] == ["-m", "signdigits"]
    values = parse_arguments([part for part in line[3:] if part != "$OPTIONS"])
    state = re.search(r"SIGN_DIGITS_HOME=(\S+)", loop)[1]  # type: ignore[index]
    assert values["corrections"] == f"{state}/corrections", "where scripts/loop looks for them"
    assert f"SIGN_DIGITS_PREDICTION_LOG={state}/prediction_log" in server
    check_loop_options(re.search(r'^Environment="LOOP=(.*)"', loop, re.MULTILINE)[1].split())  # type: ignore[index]
    hardened = [text[text.index("UMask=") :].partition("\n\n")[0] for text in (server, loop)]
    assert hardened[0].strip() == hardened[1].strip()


def test_image_has_pinned_versions() -> None:
    pins, image = read_pins(PROJECT / "requirements.txt"), read_pins(DEPLOY / "requirements.txt")
    listed = (DEPLOY / "requirements.in").read_text()
    named = {name.replace("_", "-") for name in re.findall(r"^[\w-]+", listed, re.MULTILINE)}
    assert named <= set(image)
    assert image["mlflow-skinny"] == pins["mlflow"]
    shared = set(pins) & set(image)
    assert {name: image[name] for name in shared} == {name: pins[name] for name in shared}
    assert not {"tensorflow", "keras"} & set(image)
