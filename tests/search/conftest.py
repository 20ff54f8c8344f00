"""A search that tests of the engine, of MLflow and of the browser look at."""

from pathlib import Path

import pytest

from slimfront.search.engine.runner import run_search
from slimfront.search.record.ledger import SearchResult
from tests.conftest import small_config


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> tuple[Path, SearchResult]:
    """One search of six trials and where it is; nobody changes it."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, run_search(
        small_config(directory, search={"trials": 6}, resources={"pack": "auto"})
    )
