"""Real Ray clusters for tests: nodes on this machine that can be added and killed."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

BIN = Path(sys.executable).parent


class RayCluster:
    """Nodes of one core each, with token authentication, and what talks to them. A context
    manager."""

    def __init__(self, **environment: str) -> None:
        """`environment` is that of every node, beside this process's."""
        ports = free_ports(3)
        self.port, self.dashboard, self.client = ports
        token = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment = inherited | token | {"PATH": path} | environment
        self.jobs = f"http://127.0.0.1:{self.dashboard}"
        self.stack = contextlib.ExitStack()
        self.nodes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        # Paths of sockets must be short.
        self.directory = Path(
            self.stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
            )
        )
        self.work = self.directory / "work"
        """The directory that commands are run in."""
        self.work.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            kill_group(node)
        self.stack.close()

    def add_head(self, *options: str) -> subprocess.Popen[str]:
        """Starts the head, with dashboard and Ray Client's server, and waits until it is there."""
        ports = [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={self.client}",
        ]
        return self._start("--head", *ports, *options)

    def add_autoscaling_head(self, most: int) -> subprocess.Popen[str]:
        """Starts a head without cores whose autoscaler, Ray's own, adds up to `most` nodes of one
        core."""
        types = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        }
        provider = {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{self.port}",
            "disable_node_updaters": True,
        }
        commands = (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
        scaling: dict[str, object] = {f"{name}_commands": [] for name in commands}
        scaling |= {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
        scaling |= {
            "cluster_name": "test",
            "max_workers": most,
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": 10,
        }
        scaling |= {
            "provider": provider,
            "available_node_types": types,
            "head_node_type": "ray.head.default",
        }
        file = self.directory / "scaling.json"
        file.write_text(json.dumps(scaling | {"file_mounts_sync_continuously": False}))
        return self.add_head(f"--autoscaling-config={file}", "--num-cpus=0")

    def add_node(self) -> subprocess.Popen[str]:
        """Starts another node, and waits until it has joined."""
        return self._start(f"--address=127.0.0.1:{self.port}")

    def _start(self, *options: str) -> subprocess.Popen[str]:
        said = self.directory / f"node{len(self.nodes)}.txt"
        # Its own is the same for every node of a machine, and the second would have none.
        (agent,) = free_ports(1)
        # Nodes that share a directory delete what others need of it.
        where = self.directory / str(len(self.nodes))
        own = [
            "--num-cpus=1",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}",
            f"--temp-dir={where}",
        ]
        command = [BIN / "ray", "start", "--block", *own, *options]
        with said.open("w") as out:
            node = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=self.environment,
            )
        self.nodes.append(node)
        wait_for(lambda: "Ray runtime started" in said.read_text() or node.poll() is not None, 90)
        assert node.poll() is None, said.read_text()
        return node

    def run(
        self, *command: str, seconds: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs `slimfront` with these words, as a user of the cluster who has its token."""
        words = [str(BIN / "slimfront"), *command]
        return subprocess.run(
            words,
            env=self.environment | environment,
            cwd=self.work,
            capture_output=True,
            text=True,
            timeout=seconds,
        )


def kill_group(process: subprocess.Popen[str]) -> None:
    """Everything of a node dies at once, as when its power goes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], object], seconds: float) -> object:
    """What `condition` gives as soon as it is true."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"it did not happen within {seconds} s")


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
