"""compose.yaml, without a Docker engine: what Docker would refuse, and what must hold of it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimfront.search.config.loading import load

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = {
    line.partition("=")[0]
    for line in (DOCKER / ".env.example").read_text().splitlines()
    if "=change-me" in line
}
KEYS = {
    *(
        "image",
        "build",
        "init",
        "restart",
        "read_only",
        "cap_drop",
        "security_opt",
        "user",
        "entrypoint",
        "command",
        "environment",
    ),
    *(
        "volumes",
        "tmpfs",
        "shm_size",
        "stop_signal",
        "healthcheck",
        "ports",
        "depends_on",
        "deploy",
        "cpus",
        "mem_limit",
    ),
}
"""Of the Compose specification, as far as they are used; another one is a slip until it stands
here."""

services = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def filled(text: str) -> str:
    """With the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@services
def test_a_service_says_how_it_is_healthy_and_waits_for_healthy_ones(
    service: dict[str, Any],
) -> None:
    check = service["healthcheck"]
    assert set(check) == {"test", "interval", "timeout", "retries"}
    assert check["test"][0] == "CMD" and len(check["test"]) > 1
    for needed, how in service.get("depends_on", {}).items():
        assert needed in SERVICES and how == {"condition": "service_healthy"}


@services
def test_a_service_has_only_known_keys_and_may_do_no_more_than_it_must(
    service: dict[str, Any],
) -> None:
    assert set(service) <= KEYS
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert not service.get("build") or service["build"]["dockerfile"] == "docker/Dockerfile"


@services
def test_a_service_is_published_on_the_loopback_interface_alone(service: dict[str, Any]) -> None:
    listens = re.findall(r"port=(\d+)", " ".join(service["command"]))
    for port in service.get("ports", []):
        address, outside, inside = filled(port).split(":")
        assert address == "127.0.0.1"
        assert outside == inside and inside in listens


def test_nothing_reaches_the_databases_from_outside() -> None:
    assert "ports" not in SERVICES["postgres"]


@services
def test_an_image_is_pinned_by_a_tag(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", filled(service["image"]))


@services
def test_every_secret_comes_from_the_environment_and_is_asked_for(service: dict[str, Any]) -> None:
    for name, value in service["environment"].items():
        asked = re.fullmatch(r"\$\{(\w+):\?is not set; docker/secrets.sh makes secrets\}", value)
        assert (asked is not None) == bool(re.search(r"PASSWORD|TOKEN|SECRET", name))
        assert asked is None or asked[1] in SECRETS
        assert asked is not None or not re.search(r"://[^@/]*:[^@/]*@", value)
    assert not re.search(r"PASSWORD|TOKEN|SECRET", " ".join(service["command"]))


def test_the_example_has_every_secret_and_no_other() -> None:
    assert set(re.findall(r"\$\{(\w+):\?", TEXT)) == SECRETS


def test_a_worker_has_no_secret_but_the_token_of_its_cluster() -> None:
    assert set(re.findall(r"\$\{(\w+):\?", yaml.safe_dump(SERVICES["worker"]))) == {
        "RAY_AUTH_TOKEN"
    }


@services
def test_a_volume_is_declared_or_a_file_of_ours(service: dict[str, Any]) -> None:
    for volume in service.get("volumes", []):
        source, target, *mode = volume.split(":")
        assert target.startswith("/")
        if source.startswith("./"):
            assert (DOCKER / source).is_file() and mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


def test_nodes_of_the_cluster_share_the_runs() -> None:
    assert (
        "runs:/runs" in SERVICES["head"]["volumes"]
        and "runs:/runs" in SERVICES["worker"]["volumes"]
    )


def test_the_config_for_the_stack_names_its_services_and_holds_no_password() -> None:
    config = load(ROOT / "configs" / "cluster.yaml")
    listens = {
        name: re.findall(r"port=(\d+)", " ".join(service["command"]))
        for name, service in SERVICES.items()
    }
    for uri in (config.tracking.uri, config.search.storage or ""):
        found = re.fullmatch(r"[\w+]+://(?:slimfront@)?(\w+):(\d+)(?:/optuna)?", uri)
        assert found is not None and found[2] in listens[found[1]]
    assert config.search.storage_path == "/runs"


def test_the_gpu_overlay_changes_what_is_there() -> None:
    overlay = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]
    assert set(overlay) == {"worker"} and set(overlay["worker"]) <= KEYS
    (devices,) = overlay["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "ARG TORCH=" in (DOCKER / "Dockerfile").read_text() and set(
        overlay["worker"]["build"]["args"]
    ) == {"TORCH"}


def test_the_stack_does_not_start_with_a_placeholder() -> None:
    command = [sys.executable, str(DOCKER / "native.py")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "POSTGRES_PASSWORD": "change-me"},
    )
    assert done.returncode == 2
    assert "slimfront: POSTGRES_PASSWORD is still the placeholder" in done.stderr
