"""What MLflow does not document, and we rely on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_lightning() -> Iterator[None]:
    """Within, the first import of `mlflow.pytorch` does not import Lightning, which takes longer
    than most else that a small search does. The one name that needs it comes when it is asked for.
    """
    name = "pytorch_lightning"
    if "mlflow.pytorch" in sys.modules or name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
    vars(sys.modules["mlflow.pytorch"])["__getattr__"] = _of_lightning


def _of_lightning(name: str) -> Any:
    if name != "MlflowModelCheckpointCallback":
        raise AttributeError(f"module 'mlflow.pytorch' has no attribute '{name}'")
    from mlflow.pytorch._lightning_autolog import MlflowModelCheckpointCallback

    return MlflowModelCheckpointCallback
