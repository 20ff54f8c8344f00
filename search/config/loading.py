"""Reads configs: of a file, of a mapping, as they were recorded, or some sections alone; one
sentence says what is wrong."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from slimfront.search.config.overrides import overridden
from slimfront.search.config.schema import Config
from slimfront.search.config.space import Tree
from slimfront.search.config.yaml_files import GIVEN, RECORDED, Limits, parse, read_text, write
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import UserError, one_line, shorten
from slimfront.trainables.options import explain, suggest

CandidateT = TypeVar("CandidateT", bound=Candidate)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a config.

    Args:
        path: a YAML file.
        overrides: `dotted.path=value` each, the value as YAML; they replace what the file says.

    Raises:
        UserError: one sentence of one line that says what is wrong, where, and what would be right.
    """

    def text() -> str:
        return read_text(path)

    return _explained(text, str(path), overrides, GIVEN, Config.model_validate)


def from_mapping(tree: Tree, overrides: Sequence[str] = ()) -> Config:
    """The config that a YAML file with this content would be. Raises UserError as `load`."""

    def as_text() -> str:
        return write(dict(tree))

    return _explained(as_text, "the config", overrides, GIVEN, Config.model_validate)


def load_recorded(text: str, overrides: Sequence[str] = ()) -> Config:
    """The config that `dump` wrote down as `text`, with overrides. Raises UserError as `load`.

    All keys were recorded, so that one that is missing is newer than the record: what it switches
    on stays off.
    """

    def made(tree: Tree) -> Config:
        return Config.model_validate(_as_it_was(tree))

    return _explained(lambda: text, "the config as it was recorded", overrides, RECORDED, made)


def _as_it_was(tree: Tree) -> dict[str, Any]:
    """A recorded config with the values of keys that came later at which they change nothing."""
    full = dict(tree)
    one_shot = full.get("one_shot")
    if isinstance(one_shot, Mapping):
        full["one_shot"] = {"refine": 0, **one_shot}
    sparsifier = full.get("sparsifier")
    if not isinstance(sparsifier, Mapping):
        return full
    if sparsifier.get("name") == "channels":
        full["sparsifier"] = {"of": "channels", **sparsifier}
    return full


def load_sections(
    path: Path, sections: Collection[str], overrides: Sequence[str] = ()
) -> Candidate:
    """The candidate of some sections of a config, `data` among them; the others are not looked
    at, and need not be there.

    Raises:
        UserError: as `load`.
    """

    def made(tree: Tree) -> Candidate:
        for key in tree:
            if key not in Config.model_fields:
                hint = suggest(str(key), Config.model_fields)
                raise UserError(f"{path}: unknown key '{shorten(key)}'; {hint}")
        if "data" not in tree:
            raise UserError(f"{path}: it has no 'data' section, which says what the data are")
        wanted = {key: tree[key] for key in sections if key in tree}
        return Candidate.model_validate(wanted)

    return _explained(lambda: read_text(path), str(path), overrides, GIVEN, made)


def _explained(
    read: Callable[[], str],
    where: str,
    overrides: Sequence[str],
    limits: Limits,
    make: Callable[[Tree], CandidateT],
) -> CandidateT:
    """What `make` makes of a config, or one sentence: whatever a text makes YAML, Optuna or
    pydantic raise, it is a mistake in the text."""
    try:
        tree = _tree(read(), where, overrides, limits)
        return make(tree)
    except UserError as error:
        message = str(error)
    except ValidationError as error:
        message = f"{where}: {explain(error)}"
    except Exception as error:  # RecursionError and MemoryError too
        message = f"{where}: this config cannot be used ({type(error).__name__}: {error})"
    raise UserError(one_line(message))


def _tree(text: str, where: str, overrides: Sequence[str], limits: Limits) -> Tree:
    raw = parse(text, where, limits)
    if not isinstance(raw, Mapping):
        kind = type(raw).__name__
        raise UserError(f"{where}: a config is a mapping of keys to values, and this is {kind}")
    return overridden(raw, overrides, limits)
