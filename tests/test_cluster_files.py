"""The files that start a cluster: Ray's launcher, KubeRay and Slurm would take them."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from backlens.cli.main import app
from tests.kuberay import RAY_CLUSTER

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
assert PINNED is not None
RAY = PINNED[1]


@pytest.fixture
def launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / "raycluster.yaml").read_text("utf-8"))


def test_rays_own_schema_accepts_the_launcher_file(launcher: dict[str, Any]) -> None:
    validate_config(launcher)
    prepared = prepare_config(copy.deepcopy(launcher))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu.spot", "gpu.on-demand"}


def test_the_schema_is_no_formality(launcher: dict[str, Any]) -> None:
    launcher["available_node_types"]["head"]["resource"] = {"CPU": 1}
    with pytest.raises(Exception, match="resource"):
        validate_config(launcher)


def test_the_head_is_on_demand_and_workers_are_spot_machines_with_gpus(launcher: dict[str, Any]) -> None:
    types = launcher["available_node_types"]
    assert launcher["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert "InstanceMarketOptions" not in types["gpu.on-demand"]["node_config"]
    assert types["gpu.spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for name in ("gpu.spot", "gpu.on-demand"):
        assert types[name]["resources"]["GPU"] >= 1
        assert types[name]["max_workers"] > types[name]["min_workers"]
    project = yaml.safe_load((ROOT / "jobs" / "project.yaml").read_text("utf-8"))["options"]
    assert types["gpu.spot"]["min_workers"] >= project["replicas"]


def test_both_kinds_of_cluster_run_the_pinned_ray_with_tokens_and_shared_storage(
    launcher: dict[str, Any], kubernetes: dict[str, Any]
) -> None:
    options = launcher["docker"]["run_options"]
    assert launcher["docker"]["image"].startswith(f"rayproject/ray:{RAY}-py311")
    assert "-e RAY_AUTH_MODE=token" in options
    assert "-v /mnt/shared:/mnt/shared" in options
    assert kubernetes["spec"]["rayVersion"] == RAY
    assert kubernetes["spec"]["authOptions"] == {"mode": "token"}
    for pod in _pods(kubernetes):
        claimed = [volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert claimed == ["shared"]


def _pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_kuberays_fields_are_what_the_manifest_has(kubernetes: dict[str, Any]) -> None:
    jsonschema.validate(kubernetes, RAY_CLUSTER)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("spec", "enableInTreeAutoscalling", True),
        ("headGroupSpec", "rayStartParams", {"num-cpus": 0}),
        ("headGroupSpec", "serviceType", "Cluster"),
        ("authOptions", "mode", "tokens"),
        ("autoscalerOptions", "idleTimeoutSeconds", "600"),
    ],
)
def test_a_mistake_in_the_manifest_is_found(
    kubernetes: dict[str, Any], place: str, name: str, value: object
) -> None:
    spec = kubernetes["spec"]
    (spec if place == "spec" else spec[place])[name] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(kubernetes, RAY_CLUSTER)


def test_the_kubernetes_manifest_is_whole(kubernetes: dict[str, Any]) -> None:
    """Without a Kubernetes here: what has to agree between its parts."""
    spec = kubernetes["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for pod in _pods(kubernetes):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len({container["image"] for pod in _pods(kubernetes) for container in pod["containers"]}) == 1


def test_the_slurm_script_is_a_script_whose_commands_there_are() -> None:
    script = ROOT / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text("utf-8")
    started = text[text.index("ray symmetric-run") :].replace("\\\n", " ").split(" -- ")
    words = started[1].replace('"$config"', "").replace('"$head:6379"', "head:6379").split()
    app.parse_args(words[1:])
    ray = str(Path(sys.executable).with_name("ray"))
    known = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"--[a-z-]+", started[0]):
        assert option in known or option == "--min-nodes"


def test_the_commands_of_the_cluster_page_are_ones_that_backlens_takes() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text("utf-8")
    lines = re.findall(r"^backlens (.*)$", page, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        app.parse_args(line.split())
