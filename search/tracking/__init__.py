"""MLflow: the recorder of a search, its figures, and the UI."""

from mlflow import MlflowClient as Client

from slimfront.search.tracking.recorder import Recorder
from slimfront.search.tracking.store import check_store, connect, taking_writes

__all__ = ["Client", "Recorder", "check_store", "connect", "taking_writes"]
