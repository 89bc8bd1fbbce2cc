"""The files for containers and clusters: they can be read, fit each other, and name only what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

from fssdeploy import __version__
from fssdeploy.cli.app import app
from fssdeploy.serving.environment import NUMPY, Environment
from fssdeploy.serving.models.metrics import FAMILIES
from fssdeploy.serving.server import FIRST_PORT, GRACE_SECONDS, Server

yaml = pytest.importorskip("yaml", reason="THE DEPLOYMENT FILES WERE NOT TESTED: PyYAML is not installed")
from tests.serving.helm import render  # noqa: E402 - it needs PyYAML

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
CHART = DEPLOY / "helm" / "fssdeploy"
PORTS = {"http": FIRST_PORT, "grpc": FIRST_PORT + 1, "metrics": FIRST_PORT + 2}

# What server 2.51 prints without a GPU, read from one.
ON_CPU = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
    "nv_pinned_memory_pool_total_bytes",
    "nv_pinned_memory_pool_used_bytes",
    "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
}
# From the server's documentation.
ON_GPU = {
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
    "nv_energy_consumption",
}
# Values that change what a template yields.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "all on": {
        "image": {"tag": "2"},
        "models": {"claim": "repository"},
        "bank": {"claim": "classes"},
        "autoscaling": {"enabled": True},
        "podMonitor": True,
        "podAnnotations": {"team": "vision"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
    },
    "all off": {"networkPolicy": {"enabled": False}, "bank": {"storageClass": "fast"}, "replicas": 3},
    "nobody": {"networkPolicy": {"clients": [], "metrics": []}},
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def serve_options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def expressions(value: Any) -> list[str]:
    """All PromQL in a dashboard."""
    if isinstance(value, dict):
        own = [text for key, text in value.items() if key in ("expr", "query") and isinstance(text, str)]
        return own + [text for inner in value.values() for text in expressions(inner)]
    return [text for inner in value for text in expressions(inner)] if isinstance(value, list) else []


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:nv|fssdeploy)_[a-z_]+\b", text))


def container(variant: str = "as it is") -> dict[str, Any]:
    (deployment,) = render(CHART, VARIANTS[variant])["server"]
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


def test_every_file_can_be_read() -> None:
    read = [
        json.loads(path.read_text("utf-8")) if path.suffix == ".json" else load(path)
        for path in DEPLOY.rglob("*")
        if path.suffix in (".json", ".yaml") and "templates" not in path.parts
    ]
    assert len(read) >= 7
    assert all(read)


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = metric_names(" ".join(expressions(dashboard)))
    assert shown <= ON_CPU | ON_GPU | set(FAMILIES)
    assert set(FAMILIES) <= shown, "a metric of ours is not shown"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in dashboard["panels"]]
    for x, y, width, height in places:
        assert x + width <= 24
        overlapping = [
            place
            for place in places
            if place[0] < x + width and x < place[0] + place[2] and place[1] < y + height and y < place[1] + place[3]
        ]
        assert len(overlapping) == 1
    for text in expressions(dashboard):
        assert text.count("(") == text.count(")")
        assert text.count("{") == text.count("}")


def test_the_real_server_has_the_metrics_that_are_shown(server_environment: Environment, tmp_path: Path) -> None:
    version = tmp_path / "models" / "echo" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(
        'backend: "python" input { name: "x" data_type: TYPE_FP32 dims: 1 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 1 } instance_group { kind: KIND_CPU count: 1 }'
    )
    (version / "model.py").write_text("class TritonPythonModel:\n    def execute(self, requests):\n        return []\n")
    server = Server(tmp_path / "models", server_environment, log=tmp_path / "log")
    with server, urllib.request.urlopen(server.metrics_url) as answer:
        text = answer.read().decode()
    assert set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) >= ON_CPU


def test_the_container_is_started_as_the_command_allows() -> None:
    script = (DEPLOY / "serve.sh").read_text()
    options = dict(re.findall(r"(--[a-z-]+) (\S+)", script.partition("exec fssdeploy serve")[2]))
    assert set(options) <= serve_options()
    assert {name: int(options[f"--{name}-port"]) for name in PORTS} == PORTS
    assert options["--host"] == "0.0.0.0"
    assert options["--bank"] == "/bank"
    subprocess.run(["sh", "-n", str(DEPLOY / "serve.sh")], check=True)
    for arguments in (load(DEPLOY / "compose.yaml")["services"]["server"]["command"], container()["args"]):
        assert {argument for argument in arguments if argument.startswith("--")} <= serve_options()


def test_the_image_has_what_the_models_need() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert f'"{NUMPY}"' in text
    for folder in re.findall(r"^COPY (?:--\S+ )?(\S+)", text, re.MULTILINE):
        assert (DEPLOY.parents[1] / folder).exists(), folder
    project = (DEPLOY.parents[1] / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert declared
    for requirement in re.findall(r'"([^"]+)"', declared[1]):
        name = re.split("[<>=]", requirement)[0]
        if name not in ("numpy", "onnxruntime"):
            assert f'"{requirement}"' in text, f"{requirement} in the Dockerfile is another one"
    for extra in ("tritonclient", "scipy"):
        requirement = re.search(rf'"({extra}[^"]+)"', project)
        assert requirement
        assert f'"{requirement[1]}"' in text
    assert f"EXPOSE {' '.join(map(str, PORTS.values()))}" in text
    assert f"http://127.0.0.1:{PORTS['http']}/v2/health/ready" in text


def test_compose_fits_the_image_and_stays_on_loopback() -> None:
    compose = load(DEPLOY / "compose.yaml")
    services = compose["services"]
    assert services["server"]["image"] == f"fssdeploy:{__version__}"
    published = [port for service in services.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert {f"127.0.0.1:{port}:{port}" for port in PORTS.values()} == set(services["server"]["ports"])
    mounted = {
        volume.split(":")[-2] if volume.endswith(":ro") else volume.split(":")[-1]
        for volume in services["server"]["volumes"]
    }
    assert "/bank" in mounted
    assert (DEPLOY / services["server"]["build"]["context"] / "pyproject.toml").exists()
    assert (DEPLOY / services["server"]["build"]["context"] / services["server"]["build"]["dockerfile"]).exists()
    for service in services.values():
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).is_file()
    (scrape,) = load(DEPLOY / "prometheus.yaml")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"server:{PORTS['metrics']}"]}]
    for config in compose["configs"].values():
        assert yaml.safe_load(config["content"])["apiVersion"] == 1


def test_values_fit_their_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="THE CHART'S SCHEMA WAS NOT TESTED: jsonschema is missing")
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = load(CHART / "values.yaml")
    assert set(schema["properties"]) == set(values)
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(values)
    for wrong in (
        {"replica": 1},
        {"replicas": "2"},
        {"bank": {"size": "much"}},
        {"bank": {"size": "1Gi", "clam": "x"}},
        {"service": {"type": "Public"}},
        {"autoscaling": {"enabled": True, "minReplicas": 0, "maxReplicas": 1, "queueMilliseconds": 1}},
        {"models": {"claim": "Not_A_Name"}},
    ):
        assert not validator.is_valid({**values, **wrong}), wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_yields_whole_objects(variant: str) -> None:
    rendered = render(CHART, VARIANTS[variant])
    objects = [each for name, documents in rendered.items() if name != "NOTES" for each in documents]
    kinds = [each["kind"] for each in objects]
    assert len(set(kinds)) == len(kinds)
    assert {"Deployment", "Service"} <= set(kinds)
    for each in objects:
        assert each["metadata"]["name"].startswith("fss")
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "fss"
        assert each["metadata"]["labels"]["app.kubernetes.io/version"] == __version__
    (deployment,) = rendered["server"]
    pod = deployment["spec"]["template"]
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= pod["metadata"]["labels"].items()
    for each in objects:
        own = each["spec"].get("selector", {}) if each["kind"] in ("Service", "PodMonitor") else {}
        own = each["spec"]["podSelector"] if each["kind"] == "NetworkPolicy" else own
        if own:
            assert own.get("matchLabels", own) == selector
    (server,) = pod["spec"]["containers"]
    mounted = {mount["name"] for mount in server["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert ("models" in mounted) == bool(VARIANTS[variant].get("models"))


def test_what_can_be_chosen_is_in_the_objects() -> None:
    plain, full, off = (render(CHART, VARIANTS[name]) for name in ("as it is", "all on", "all off"))
    (deployment,) = full["server"]
    pod = deployment["spec"]["template"]["spec"]
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"models": "repository", "bank": "classes"}
    assert not full["bank"], "a claim of one's own is not made again"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["containers"][0]["image"] == "fssdeploy:2"
    assert "replicas" not in deployment["spec"], "it would fight the autoscaler"
    assert deployment["spec"]["template"]["metadata"]["annotations"] == {"team": "vision"}
    (claim,) = plain["bank"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert container()["image"] == f"fssdeploy:{__version__}"
    assert {"name": "bank", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in plain["server"][0][
        "spec"
    ]["template"]["spec"]["volumes"]
    assert off["server"][0]["spec"]["replicas"] == 3
    assert off["bank"][0]["spec"]["storageClassName"] == "fast"
    assert not off["network"]
    assert not plain["monitor"]
    assert len(plain["network"][0]["spec"]["ingress"]) == 2
    assert render(CHART, VARIANTS["nobody"])["network"][0]["spec"]["ingress"] is None


def test_ports_and_probes_fit_the_server() -> None:
    found = container()
    assert {port["name"]: port["containerPort"] for port in found["ports"]} == PORTS
    (service,) = render(CHART)["service"]
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == {
        name: PORTS[name] for name in ("http", "grpc")
    }
    for probe, path in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        assert found[probe]["httpGet"] == {"path": f"/v2/health/{path}", "port": "http"}
        assert found[probe]["timeoutSeconds"] < found[probe]["periodSeconds"]
    pod = render(CHART)["server"][0]["spec"]["template"]["spec"]
    pause = int(found["lifecycle"]["preStop"]["exec"]["command"][1])
    schema = json.loads((CHART / "values.schema.json").read_text())
    longest = schema["properties"]["exitTimeout"]["maximum"]
    assert pod["terminationGracePeriodSeconds"] > pause + longest + GRACE_SECONDS
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_autoscaler_looks_at_what_the_adapter_makes() -> None:
    (rule,) = load(DEPLOY / "prometheus-adapter.yaml")["rules"]["custom"]
    (autoscaler,) = render(CHART, VARIANTS["all on"])["autoscaler"]
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    used = metric_names(rule["metricsQuery"]) | metric_names(rule["seriesQuery"])
    assert used <= ON_CPU
    assert rule["metricsQuery"].count("(") == rule["metricsQuery"].count(")")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == render(CHART)["server"][0]["metadata"]["name"]


def test_the_chart_is_of_this_version() -> None:
    about = load(CHART / "Chart.yaml")
    assert about["appVersion"] == __version__


def test_helm_itself_accepts_the_chart() -> None:
    helm = shutil.which("helm")
    if helm is None:
        reason = "HELM ITSELF HAS NOT SEEN THE CHART: there is no helm on PATH"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    subprocess.run([helm, "lint", "--strict", str(CHART)], check=True)
    done = subprocess.run([helm, "template", "fss", str(CHART)], check=True, capture_output=True, text=True)
    expected = [each for name, documents in render(CHART).items() if name != "NOTES" for each in documents]
    found = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert sorted(found, key=lambda each: each["kind"]) == sorted(expected, key=lambda each: each["kind"])
