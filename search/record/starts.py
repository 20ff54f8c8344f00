"""The values that a search tries first."""

import logging

from optuna.distributions import BaseDistribution, CategoricalDistribution

from slimfront.search.config.schema import Config
from slimfront.search.config.space_checks import is_in, shown
from slimfront.search.record.events import Values
from slimfront.search.record.session import read_search
from slimfront.trainables.errors import UserError, first_few, shorten

log = logging.getLogger(__name__)


def starting_values(config: Config) -> list[Values]:
    """The values to try first: those of the config, or of the front of an earlier search as far as
    they vary here."""
    wanted = config.search.start_from
    space = config.search_space
    if not isinstance(wanted, str):
        return [space.recorded(values) for values in wanted]
    try:
        _, ledger = read_search(wanted, config.search.storage_path)
    except UserError as error:
        raise UserError(f"search.start_from: {error}") from None
    distributions = config.distributions()
    found: list[Values] = []
    elsewhere: dict[str, None] = {}
    """What varied there alone."""
    # Several networks of a trial may be on the front.
    trials = {point.trial.label: point.trial for point in ledger.front.members()}
    for trial in trials.values():
        values = {}
        for path, value in trial.values.items():
            if path in distributions:
                values[path] = value
            elif path not in space.parameters:
                elsewhere[path] = None
        taken = _taken(values, distributions, f"{trial.label} of {wanted}")
        if taken and taken not in found:
            found.append(taken)
    if elsewhere:
        log.warning(
            "search.start_from: %s varied what does not vary here, and that is left out: %s",
            wanted,
            first_few(list(elsewhere)),
        )
    if not found:
        log.warning("search.start_from: nothing is taken from the front of %s", wanted)
    return found


def _taken(values: Values, distributions: dict[str, BaseDistribution], whose: str) -> Values:
    """Those of the values that can be tried: numbers outside of the bounds too, but no choice that
    is none of the space's; each that is outside is told."""
    taken = {}
    for path, value in values.items():
        varies = distributions[path]
        if is_in(varies, value):
            taken[path] = value
            continue
        in_a_range = not isinstance(varies, CategoricalDistribution)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if in_a_range and is_number:
            taken[path] = value
            done = "it is tried all the same"
        else:
            done = "one that the space has is drawn instead"
        log.warning(
            "search.start_from: %s has %s = %s, which is outside of what the space varies in "
            "(%s); %s",
            whose,
            path,
            shorten(repr(value)),
            shown(varies),
            done,
        )
    return taken
