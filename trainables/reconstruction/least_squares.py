"""Ridge regression that starts from given weights and keeps their zeros."""

import torch
from torch import Tensor

RIDGE = 0.03
"""How much it costs to leave the given weights, as a share of what each input weighs by itself."""
_AT_LEAST = 0.001
"""And of what inputs weigh on average: one that is hardly ever there would get enormous weights."""
_STEPS = 12
"""Nobody notices whether more follow (`benchmarks.post_training`)."""
_CLOSE = 1e-4


def fitted(x: Tensor, y: Tensor, given: Tensor, free: Tensor, steps: int = _STEPS) -> Tensor:
    """The weights W (outputs, inputs) that minimise ‖x Wᵀ − y‖² + Σ_i r_i ‖W_i − V_i‖² with inputs
    i, given weights V and the `ridge_of` r, where they are `free`; the others stay.

    Args:
        x: (groups, rows, inputs): each group is a regression of its own.
        y: (groups, rows, outputs).
        given: (groups, outputs, inputs).
        free: (groups, outputs, inputs) bool.
        steps: of conjugate gradients, where each output has free inputs of its own.
    """
    x, y, given = x.float(), y.float(), given.float()
    gram = x.mT @ x
    ridge = ridge_of(gram)
    gram = gram + ridge.diag_embed()
    missing = y - x @ given.mT
    wanted = missing.mT @ x  # of the change
    scale = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    free = free & (scale > 0)
    if len(x) == 1:
        some, of_any = free[0].any(1), free[0].any(0)
        if bool(free[0][some][:, of_any].all()):
            wanted[0, ~some] = 0
            return given + _at_once(gram[0].double(), wanted[0].double(), of_any).float()
    return given + _by_steps(gram, scale, wanted, free, steps)


def ridge_of(gram: Tensor) -> Tensor:
    """What it costs to change the weights of each input, (…, inputs), by xᵀx (…, inputs, inputs);
    0 for one that is always 0."""
    own = gram.diagonal(dim1=-2, dim2=-1)
    there = own > 0
    mean = own.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(there, RIDGE * own + _AT_LEAST * mean, 0)


def _at_once(gram: Tensor, wanted: Tensor, changes: Tensor) -> Tensor:
    """The change (outputs, inputs) of one group, where the same inputs are free for all outputs."""
    found = torch.zeros_like(wanted)
    places = changes.nonzero().flatten()
    if len(places):
        of_free = gram[places][:, places]
        factor = torch.linalg.cholesky(of_free)
        found[:, places] = torch.cholesky_solve(wanted[:, places].t(), factor).t()
    return found


def _by_steps(gram: Tensor, scale: Tensor, wanted: Tensor, free: Tensor, steps: int) -> Tensor:
    """The change where each output has free inputs of its own: by conjugate gradients, of all
    outputs at once, each with steps of its own (Hestenes & Stiefel 1952), preconditioned by the
    diagonal."""
    scale = scale.clamp_min(torch.finfo(gram.dtype).tiny)
    change = torch.zeros_like(wanted)
    left = torch.where(free, wanted, 0)
    first = left.square().sum(-1)
    direction = left / scale
    gain = (left * direction).sum(-1)
    for _ in range(steps):
        moved = torch.where(free, direction @ gram, 0)
        curvature = (direction * moved).sum(-1)
        size = torch.where(curvature > 0, gain / curvature, 0).unsqueeze(-1)
        change = change + size * direction
        left = left - size * moved
        if bool((left.square().sum(-1) <= _CLOSE**2 * first).all()):
            break
        better = left / scale
        before, gain = gain, (left * better).sum(-1)
        turn = torch.where(before > 0, gain / before, 0).unsqueeze(-1)
        direction = better + turn * direction
    return change
