"""Ridge regression that starts from given weights and keeps their zeros."""

import torch
from torch import Tensor

RIDGE = 0.03
"""How much it costs to leave the given weights, as a share of what each input weighs by itself."""
_STEPS = 60
_CLOSE = 1e-5


def fitted(x: Tensor, y: Tensor, given: Tensor, free: Tensor) -> Tensor:
    """The weights W (outputs, inputs) that minimise ‖x Wᵀ − y‖² + RIDGE · Σ_i ‖x_i‖²‖W_i − V_i‖²,
    with inputs i and given weights V, where they are `free`; the others stay. In float64.

    Args:
        x: (rows, inputs).
        y: (rows, outputs).
        given: (outputs, inputs).
        free: (outputs, inputs) bool.
    """
    x, y, given = x.double(), y.double(), given.double()
    gram = x.t() @ x
    ridge = RIDGE * gram.diagonal()
    gram = gram + ridge.diag()
    missing = y - x @ given.t()
    wanted = missing.t() @ x  # of the change: (outputs, inputs)
    free = free & (gram.diagonal() > 0)
    some = free.any(1)
    of_any = free.any(0)
    if bool(free[some][:, of_any].all()):
        wanted[~some] = 0
        return given + _at_once(gram, wanted, of_any)
    return given + _by_steps(gram, wanted, free)


def _at_once(gram: Tensor, wanted: Tensor, changes: Tensor) -> Tensor:
    """The change where the same inputs are free for all outputs."""
    found = torch.zeros_like(wanted)
    places = changes.nonzero().flatten()
    if len(places):
        of_free = gram[places][:, places]
        factor = torch.linalg.cholesky(of_free)
        found[:, places] = torch.cholesky_solve(wanted[:, places].t(), factor).t()
    return found


def _by_steps(gram: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    """The change where each output has free inputs of its own: by conjugate gradients, of all
    outputs at once, each with steps of its own (Hestenes & Stiefel 1952), preconditioned by the
    diagonal."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    change = torch.zeros_like(wanted)
    left = torch.where(free, wanted, 0)
    first = left.square().sum(1)
    better = left / scale
    direction = better
    gain = (left * better).sum(1)
    for _ in range(_STEPS):
        moved = torch.where(free, direction @ gram, 0)
        curvature = (direction * moved).sum(1)
        size = torch.where(curvature > 0, gain / curvature, 0).unsqueeze(1)
        change = change + size * direction
        left = left - size * moved
        if bool((left.square().sum(1) <= _CLOSE**2 * first).all()):
            break
        better = left / scale
        before, gain = gain, (left * better).sum(1)
        turn = torch.where(before > 0, gain / before, 0).unsqueeze(1)
        direction = better + turn * direction
    return change
