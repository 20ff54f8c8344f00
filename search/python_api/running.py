"""Running a search from Python, and reading one by its name."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from slimfront.search import terminal
from slimfront.search.config.beside import find_beside
from slimfront.search.config.loading import from_mapping
from slimfront.search.config.loading import load as load_config
from slimfront.search.config.overrides import Overrides, as_texts
from slimfront.search.config.schema import Config
from slimfront.search.python_api.found import Search
from slimfront.search.record.locate import locate
from slimfront.search.record.session import read_result


def search(
    config: str | Path | Mapping[str, Any],
    overrides: Overrides = (),
    *,
    name: str | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Search:
    """Runs a search to its end, as `slimfront search` does.

    Args:
        config: a YAML file, or what one would hold.
        overrides: values by dotted path, or texts `dotted.path=value` as of `--set`; they replace
            what the config says.
        name: of the search; made from the config's name and the time if left out.
        address: of a Ray cluster that this machine is a node of; a local one is started if left
            out.
        progress: whether to show on stderr how the search goes: a bar in a terminal, and in a
            notebook that has ipywidgets; lines elsewhere.

    Returns:
        The search with its front, as `load` reads it.

    Raises:
        UserError: one sentence that says what is wrong with the config, the data, the network or
            the stores.
    """
    loaded = _loaded(config, as_texts(overrides))
    # The heavy imports come after the check, so that a mistake in the config is answered at once.
    from slimfront.search.engine.progress import Progress, ProgressDisplay
    from slimfront.search.engine.runner import run_search

    shown: AbstractContextManager[Progress | None] = nullcontext()
    if progress:
        shown = ProgressDisplay(terminal.console(stderr=True))
    with shown as display:
        result = run_search(loaded, display, name, address=address)
    return Search(loaded, result)


def _loaded(config: str | Path | Mapping[str, Any], overrides: Iterable[str]) -> Config:
    texts = list(overrides)
    if isinstance(config, Mapping):
        return from_mapping(config, texts)
    find_beside(Path(config))
    return load_config(Path(config), texts)


def load(search: str | Path, storage_path: str | Path = "runs") -> Search:
    """Reads a search by its name, or by the path of its directory.

    It may still be running: what was measured until now is there, and a later `load` has more.

    Args:
        search: its name, or the path of its directory.
        storage_path: where searches are kept, as `search.storage_path` in the config.

    Raises:
        UserError: if there is no such search, or its journal cannot be read.
    """
    name, place = locate(str(search), str(storage_path))
    return Search(*read_result(name, place))
