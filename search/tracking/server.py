"""MLflow's server as a process on this machine."""

import os
import sys


def server_command(port: int) -> list[str]:
    """Starts MLflow's server on loopback, in one process; its store comes from
    `server_environment`."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "server", *address, "--workers", "1"]


def server_environment(store: str) -> dict[str, str]:
    """This process's environment, and the store: not on the command line, where everyone could
    read its password."""
    # Four processes for jobs of MLflow's that a search has none of would make the start twice as
    # long.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    return environment | {"MLFLOW_BACKEND_STORE_URI": store}
