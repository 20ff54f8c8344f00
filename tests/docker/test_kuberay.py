"""The manifests for Kubernetes: by its own schemas, and Ray's resources by the fields that KubeRay
documents."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kuberay"
DOCUMENTS: dict[str, dict[str, Any]] = {
    f"{document['kind']}/{document['metadata']['name']}": document
    for file in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
}
CLUSTER = DOCUMENTS["RayCluster/slimfront"]["spec"]
GROUPS: list[dict[str, Any]] = CLUSTER["workerGroupSpecs"]
PODS: dict[str, dict[str, Any]] = {
    "head": CLUSTER["headGroupSpec"]["template"],
    **{group["groupName"]: group["template"] for group in GROUPS},
    **{
        name: document["spec"]["template"]
        for name, document in DOCUMENTS.items()
        if "template" in document["spec"]
    },
}
SECRETS = set(
    re.findall(r"^(\w+)=change-me", (ROOT / "docker" / ".env.example").read_text(), re.MULTILINE)
)

pods = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS.values() if "ray.io" not in d["apiVersion"]],
    ids=lambda d: d["kind"],
)
def test_a_manifest_is_what_kubernetes_takes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pods
def test_the_template_of_a_pod_is_what_kubernetes_takes(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def test_rays_resources_have_the_fields_that_kuberay_documents() -> None:
    assert (
        DOCUMENTS["RayCluster/slimfront"]["apiVersion"]
        == DOCUMENTS["RayJob/digits"]["apiVersion"]
        == "ray.io/v1"
    )
    fields = {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    assert set(CLUSTER) == fields
    assert set(CLUSTER["autoscalerOptions"]) <= {
        "idleTimeoutSeconds",
        "resources",
        "securityContext",
        "upscalingMode",
        "version",
    }
    assert set(CLUSTER["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in GROUPS:
        assert set(group) == {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
        }
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for start in (CLUSTER["headGroupSpec"], *GROUPS):
        assert all(isinstance(value, str) for value in start["rayStartParams"].values())
    job = DOCUMENTS["RayJob/digits"]["spec"]
    assert set(job) == {"clusterSelector", "submissionMode", "entrypoint"}
    assert job["clusterSelector"] == {"ray.io/cluster": "slimfront"}
    assert job["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}


def test_the_cluster_asks_for_a_token_grows_and_runs_the_ray_that_is_pinned() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert CLUSTER["rayVersion"] == version("ray")
    # No trial beside the drivers.
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpus_are_asked_for_by_the_group_that_has_the_image_for_them() -> None:
    gpu = {group["groupName"]: group["template"]["spec"]["containers"][0] for group in GROUPS}
    assert (
        gpu["gpu"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        and gpu["gpu"]["image"] == "slimfront:cuda"
    )
    assert (
        "nvidia.com/gpu" not in gpu["cpu"]["resources"]["limits"]
        and gpu["cpu"]["image"] == "slimfront:cpu"
    )


@pods
def test_a_pod_may_do_no_more_than_it_must_and_asks_for_what_it_takes(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert (
        spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    )
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        rights = container["securityContext"]
        assert (
            rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        )
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["readinessProbe"] and container["livenessProbe"]
        assert re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", container["image"])
        assert {mount["name"] for mount in container["volumeMounts"]} <= {
            v["name"] for v in spec.get("volumes", [])
        } | {"data"}


@pods
def test_a_pod_takes_every_secret_by_reference(pod: dict[str, Any]) -> None:
    for container in pod["spec"]["containers"]:
        for entry in container["env"]:
            if not re.search("PASSWORD|TOKEN|SECRET", entry["name"]):
                assert set(entry) == {"name", "value"}
                continue
            reference = entry["valueFrom"]["secretKeyRef"]
            assert set(entry) == {"name", "valueFrom"}
            assert reference["name"] == "slimfront-secrets" and reference["key"] in SECRETS


def test_workers_have_no_secret_and_no_account() -> None:
    for group in GROUPS:
        assert "secretKeyRef" not in yaml.safe_dump(group)
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_a_volume_claim_that_is_used_is_there() -> None:
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in PODS.values()
        for volume in pod["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert used == {"slimfront-runs", "mlflow-artifacts"}
    assert all(f"PersistentVolumeClaim/{name}" in DOCUMENTS for name in used)


def test_services_have_the_names_that_the_config_for_the_cluster_knows() -> None:
    text = (ROOT / "configs" / "cluster.yaml").read_text()
    for name in ("postgres", "mlflow"):
        (port,) = DOCUMENTS[f"Service/{name}"]["spec"]["ports"]
        assert f"{name}:{port['port']}" in text
