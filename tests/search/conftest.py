"""A search that tests of the engine, of MLflow and of the browser look at."""

import os
import pickle
from pathlib import Path

import pytest
from filelock import FileLock

from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import SearchResult
from tests.conftest import small_config


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, SearchResult]:
    """One search of six trials and where it is, for all processes of the suite; nobody changes
    it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    directory = shared / "finished"
    kept = shared / "finished.pickle"
    with FileLock(f"{kept}.lock"):
        if kept.exists():
            return directory, pickle.loads(kept.read_bytes())
        request.getfixturevalue("ray_session")
        directory.mkdir()
        config = small_config(directory, search={"trials": 6}, resources={"pack": "auto"})
        result = run_search(config)
        kept.write_bytes(pickle.dumps(result))
    return directory, result
