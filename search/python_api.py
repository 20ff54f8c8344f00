"""What `import slimfront` offers of searches: running one, and reading one that was run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfront.search.config.schema import Config, from_mapping
from slimfront.search.config.schema import load as load_config
from slimfront.search.record.ledger import MeasuredNetwork, SearchResult
from slimfront.search.record.locate import locate
from slimfront.search.record.session import read_search

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SavedSearch:
    """A search as its journal tells it: `front` has its non-dominated networks."""

    name: str
    config: Config
    front: list[MeasuredNetwork]

    def network(self, point: MeasuredNetwork) -> "nn.Module":
        """The compact network of a member of the front, on the CPU and in evaluation mode.

        Raises:
            UserError: if its file is lost or damaged.
        """
        from slimfront.trainables.shipping.network_file import read

        return read(point.file, self.config.model_of(point.trial.values))


def search(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    address: str | None = None,
) -> SearchResult:
    """Runs a search to its end, as `slimfront search` does.

    Args:
        config: a YAML file, or what one would hold.
        overrides: `dotted.path=value` each, as `--set`.
        name: of the search; made from the config's name and the time if left out.
        address: of a Ray cluster that this machine is a node of; a local one is started if left
            out.

    Raises:
        UserError: one sentence that says what is wrong with the config, the data, the network or
            the stores.
    """
    from slimfront.search.engine.runner import run_search

    if isinstance(config, Mapping):
        loaded = from_mapping(config, overrides)
    else:
        loaded = load_config(Path(config), overrides)
    return run_search(loaded, name=name, address=address)


def load(search: str, storage_path: str = "runs") -> SavedSearch:
    """Reads a search by its name, or by the path of its directory; it may still be running.

    Raises:
        UserError: if there is no such search, or its journal cannot be read.
    """
    name, place = locate(search, storage_path)
    config, ledger = read_search(name, place)
    return SavedSearch(name, config, ledger.front())
