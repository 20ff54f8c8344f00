"""How far the quality of a network may be off because it was taken on so many examples and no
more."""

import math

import torch
from torch import Tensor, nn

from slimfront.trainables.tasks.active import ActiveTask, Prepare, as_stored
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.tasks.metrics import Metric

_DRAWS = 200


@torch.no_grad()
def standard_error(
    task: ActiveTask,
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    prepare: Prepare = as_stored,
) -> float:
    """The standard error of the quality, in its unit, by the bootstrap over examples (Efron 1979):
    the standard deviation of the metric over 200 samples, drawn with replacement, of as many
    examples.

    Args:
        task: what the quality is of: its first metric.
        inputs: (N, …), as they are stored.
        targets: (N, …).

    Returns:
        NaN with fewer than two examples, or where no sample has a value.
    """
    if len(targets) < 2:
        return math.nan
    generator = torch.Generator().manual_seed(0)
    metric = task.metrics[0]
    if metric.sums is not None:
        sums = _sums_of_each(task, metric, network, inputs, targets, prepare)
        values = [_resampled(metric, sums, generator) for _ in range(_DRAWS)]
    else:
        outputs = task.outputs_of(network, inputs, prepare)
        seen = task.seen(outputs)
        values = [_whole_resampled(metric, seen, targets, generator) for _ in range(_DRAWS)]
    found = torch.tensor(values, dtype=torch.float64)
    finite = found[found.isfinite()]
    if len(finite) < 2:
        return math.nan
    return float(finite.std())


def _sums_of_each(
    task: ActiveTask,
    metric: Metric,
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    prepare: Prepare,
) -> Tensor:
    """(N, k): what each example adds to the metric's totals."""
    take = metric.sums
    assert take is not None

    def of_one(output: Tensor, target: Tensor) -> Tensor:
        return take(output.unsqueeze(0), target.unsqueeze(0))

    found = []
    with evaluating(network):
        for stored, wanted in task.batches(inputs, targets):
            outputs = task.seen(network(prepare(stored)))
            wanted = wanted.to(outputs.device)
            sums = torch.func.vmap(of_one)(outputs, wanted)
            found.append(sums)
    return torch.cat(found).double().cpu()


def _resampled(metric: Metric, sums: Tensor, generator: torch.Generator) -> float:
    count = len(sums)
    drawn = torch.randint(count, (count,), generator=generator)
    times = torch.bincount(drawn, minlength=count)
    totals = times.double() @ sums
    numbers = totals.tolist()
    return metric.final(numbers)


def _whole_resampled(
    metric: Metric, outputs: Tensor, targets: Tensor, generator: torch.Generator
) -> float:
    assert metric.whole is not None
    count = len(targets)
    drawn = torch.randint(count, (count,), generator=generator)
    whole = metric.whole()
    whole.update(outputs[drawn], targets[drawn])
    return float(whole.value())
