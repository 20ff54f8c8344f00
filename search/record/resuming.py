"""The config of a search that goes on: as it began, but for what may change."""

import json
import os
from collections.abc import Sequence

from slimfront.search.config.loading import load_recorded
from slimfront.search.config.plain import as_plain
from slimfront.search.config.schema import Config
from slimfront.search.config.settings import STORE_VARIABLE
from slimfront.search.config.space import flatten
from slimfront.trainables.errors import UserError, shorten
from slimfront.trainables.redaction import HIDDEN, without_secrets

RESUMABLE = (
    "search.trials",
    "search.time",
    "search.patience",
    "search.concurrency",
    "search.retries",
    "search.repeats",
    "search.storage",
    "resources",
    "tracking.uri",
)
"""What may change when a search is resumed; `search.storage` and `tracking.uri` only to give a
password again."""


def resumed_config(
    text: str, overrides: Sequence[str], search: str, *, trains: bool = False
) -> Config:
    """The config of a search as it began, with overrides.

    Args:
        trains: whether the search goes on, which needs the secrets that its factories were given.

    Raises:
        UserError: if something else would change, or a secret is needed that was not given again.
    """
    began = load_recorded(text)
    before = flatten(as_plain(began))
    hidden = [path for path, value in before.items() if HIDDEN in str(value)]
    given = []
    for override in overrides:
        path, _, _ = override.partition("=")
        given.append(path)
        if path not in hidden and not _may_change(path):
            raise UserError(
                f"--set {shorten(override)}: a resumed search cannot change '{shorten(path)}', "
                f"only {', '.join(RESUMABLE)}; "
                f"start a new search with search.start_from={search}"
            )
    missing = [path for path in hidden if path not in given]
    if trains and missing:
        raise UserError(
            f"{missing[0]} of {search} had a secret, which is not recorded; give it again: "
            f"SLIMFRONT_SET='{missing[0]}=…' in the environment"
        )
    again = os.environ.get(STORE_VARIABLE, "")
    if "tracking.uri" not in given and _place(again) == _place(began.tracking.uri):
        # The same store, with the password that is not recorded.
        overrides = [*overrides, f"tracking.uri={json.dumps(again)}"]
    config = load_recorded(text, overrides)
    _refuse_other_stores(config, began, search)
    after = flatten(as_plain(config))
    for path in set(hidden) & set(given):
        if after[path] != before[path]:
            raise UserError(
                f"{path}: only its secret can be given again, and the rest of it differs from what "
                f"{search} began with"
            )
    return config


def _may_change(path: str) -> bool:
    """Whether `RESUMABLE` names this path, or a part of the config that it is in."""
    sections = tuple(f"{allowed}." for allowed in RESUMABLE)
    return path in RESUMABLE or path.startswith(sections)


def _place(uri: str | None) -> str:
    recorded = without_secrets(uri or "")
    # Twice: what stood alone before an @ when it was recorded was a user's name, and seems a token
    # now.
    return without_secrets(recorded)


def _refuse_other_stores(config: Config, began: Config, search: str) -> None:
    if _place(config.search.storage) != _place(began.search.storage):
        place = began.search.storage or "its own directory"
        raise UserError(f"search.storage: the study of {search} is at {place}, and stays there")
    if _place(config.tracking.absolute_uri()) != _place(began.tracking.absolute_uri()):
        raise UserError(
            f"tracking.uri: {search} is recorded at {began.tracking.shown_uri()}, and stays there"
        )
