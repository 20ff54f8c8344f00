"""Whether what a sparsifier zeroes will go when a network is made compact, and whether it went."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from slimfront.trainables.compaction import Compacted, Compaction, compact
from slimfront.trainables.errors import TrialFailure, UserError, first_few
from slimfront.trainables.penalties.features import remove_hooks
from slimfront.trainables.sparsifiers.base import ActiveSparsifier
from slimfront.trainables.sparsifiers.channels import ActiveChannels
from slimfront.trainables.sparsifiers.use.lasting import not_lasting
from slimfront.trainables.structure.channel_groups import UnitGroup
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.shared_units import why_not_compact

log = logging.getLogger(__name__)

_MORE = 1.05
"""So much more than was counted on is said."""
_A_FEW = 16
"""Weights that come with folded norms, at least."""


def name_refusal(network: nn.Module, sample: Tensor) -> None:
    """Warns of a network that compaction will refuse: after the training it is too late."""
    why = None
    with suppress(Exception):  # of code of the user's; compaction says what it was
        why = why_not_compact(network, sample[:2])
    if why is not None:
        log.warning("compact will refuse this network when it is trained: %s", why)


def what_would_stay(network: nn.Module, sample: Tensor, groups: Sequence[UnitGroup]) -> list[str]:
    """The names of the groups of which compaction does not take out units that are zero: tried on a
    copy in which some of each are. None where it takes out none at all, or fails: why, it says
    itself."""
    try:
        twin = copied(network).eval()
    except Exception:  # of code of the user's: compaction says what it was
        return []
    remove_hooks(twin)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    for place, group in enumerate(groups):
        # As many others in each as there are groups before it: what is as wide by chance may go.
        first = (group.units // 3 + place) % group.units
        count = 1 + place % max(group.units // 2, 1)
        away = (torch.arange(group.units) - first) % group.units
        group.zero(parameters, away < count)
    muted = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        made = compact(twin, sample, Compaction(merge="never"))
    except (UserError, TrialFailure):
        return []
    finally:
        logging.disable(muted)
    left = dict(made.network.named_parameters(remove_duplicate=False))
    stay = []
    for group in groups:
        for name in group.writers:
            axis = group.axes.get(name, 0)
            if name in left and left[name].shape[axis] == parameters[name].shape[axis]:
                stay.append(group.name)
                break
    return stay if len(stay) < len(groups) else []


def name_what_does_not_last(
    network: nn.Module, sample: Tensor, sparsifier: ActiveSparsifier | None
) -> None:
    """Warns of weights that are not used as they are, so that their zeros bring nothing."""
    if sparsifier is None or isinstance(sparsifier, ActiveChannels):
        return
    names = not_lasting(network, sample[:2], sparsifier.masks)
    if names:
        log.warning(
            "zeros of the sparsifier do not last in %s: the code changes these weights before it "
            "uses them, as where their mean is subtracted or another matrix is added, so that the "
            "compact network has more non-zero weights; exclude those layers, or take the "
            "sparsifier channels",
            first_few([f"'{name}'" for name in names]),
        )


def name_what_stayed(
    whole: nn.Module, made: Compacted, sparsifier: ActiveSparsifier, options: Compaction
) -> None:
    """Warns where a compact network is larger than the zeros of the network, `whole`, let hope."""
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    nonzero = sum(int(parameter.count_nonzero()) for parameter in whole.parameters())
    left = made.measures["nonzero_params"]
    if left > _MORE * nonzero + _A_FEW:
        log.warning(
            "the compact network has %s non-zero parameters, and the one in training %s: its code "
            "computes weights from others, in which zeros do not last",
            f"{left:,.0f}",
            f"{nonzero:,}",
        )
    if isinstance(sparsifier, ActiveChannels) and options.enabled and options.multiple == 1:
        _name_channels_that_stayed(parameters, made, sparsifier)


def _name_channels_that_stayed(
    parameters: Mapping[str, Tensor], made: Compacted, sparsifier: ActiveChannels
) -> None:
    expected = sparsifier.counted(parameters)
    there = made.measures["params"]
    if expected is None or there <= _MORE * expected + _A_FEW:
        return
    left = dict(made.network.named_parameters(remove_duplicate=False))
    stayed = []
    for group in sparsifier.groups:
        as_before = [
            name
            for name in group.writers
            if name in left and left[name].shape == parameters[name].shape
        ]
        if as_before and not group.alive(parameters).all():
            stayed.append(f"'{group.name}'")
    log.warning(
        "fewer channels went than the sparsifier has zeroed: it counted on %s parameters, and the "
        "compact network has %s; channels stay as zeros where the code does what would change "
        "without them%s",
        f"{expected:,}",
        f"{there:,.0f}",
        f": those of {first_few(stayed)}" if stayed else "",
    )
