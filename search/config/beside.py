"""Where modules that a config names by import path are found, beside the working directory."""

import os
import sys
from pathlib import Path


def find_beside(config: Path) -> None:
    """Has modules found that lie beside the config, here and in the processes that a Ray of our own
    starts."""
    try:
        beside = str(config.resolve().parent)
    except (OSError, RuntimeError, ValueError):  # links in a circle, say: told where it is read
        return
    if beside not in sys.path:
        sys.path.append(beside)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if beside not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, beside])
