"""MLflow: the recorder of a search, its figures, and the UI."""

from search.tracking.recorder import Recorder
from search.tracking.store import connect

__all__ = ["Recorder", "connect"]
