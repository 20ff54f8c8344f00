"""A plain loop with Slimming does what our own loop does, for every penalty and sparsifier; packs
and several processes do what our own loop does too (test_conformance.py of packs, test_team.py)."""

from typing import Any

import pytest
import torch

import slimfront as sf
from slimfront.trainables.penalties import PENALTIES
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.training.loop import Training
from tests.trainables.packs.made import FORMS

STEPS_PER_EPOCH = 6
EPOCHS = 9  # 54 steps
SPARSE = {
    name: {"name": name}
    | ({"every": 2} if "every" in options.model_fields else {})
    | ({} if name == "nm" else {"sparsity": 0.6})
    for name, options in SPARSIFIERS.items()
}
PENALISED = [
    pytest.param(
        {name: {"strength": 0.01} | ({"form": form} if form else {"every": 2})}, id=f"{name}-{form}"
    )
    for name, form in FORMS
]


def candidate(optimizer: str, **changes: Any) -> sf.Candidate:
    tree: dict[str, Any] = {
        "model": {"factory": "tests.trainables.distributed.made:Doubled"},
        "training": {
            "epochs": EPOCHS,
            "batch_size": 199,
            "lr": 0.05 if optimizer == "sgd" else 0.003,
            "seed": 7,
            "optimizer": optimizer,
            "schedule": "constant",
        },
    }
    return sf.Candidate.model_validate(tree | changes)


def in_our_loop(wanted: sf.Candidate) -> Training:
    training = Training(wanted)
    for _ in range(EPOCHS):
        training.run_epoch()
    training.close()
    return training


def in_a_plain_loop(
    wanted: sf.Candidate, penalties: dict[str, Any], sparsifier: Any
) -> tuple[torch.nn.Module, sf.Slimming]:
    """The same batches, with torch's optimiser and Slimming alone."""
    start = Training(wanted.model_copy(update={"penalties": {}, "sparsifier": None}))
    network, data = start.model, start.data
    options = wanted.training
    if options.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(network.parameters(), options.lr, options.momentum)
    else:
        optimizer = torch.optim.Adam(network.parameters(), options.lr)
    inputs, targets = start._examples(200)
    slim = sf.Slimming(
        network,
        optimizer,
        inputs,
        steps=EPOCHS * STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
        penalties=penalties,
        sparsifier=sparsifier,
        targets=targets,
        loss=data.task.loss,
        seed=7,
    )
    shuffler = torch.Generator().manual_seed(7)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train.targets), generator=shuffler).split(199):
            seen = data.prepare(data.train.inputs[batch])
            loss = data.task.loss(network(seen), data.train.targets[batch]) + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
    slim.close()
    return network, slim


def check(wanted: sf.Candidate, penalties: dict[str, Any], sparsifier: Any) -> None:
    ours = in_our_loop(wanted)
    network, slim = in_a_plain_loop(wanted, penalties, sparsifier)
    for (name, mine), theirs in zip(
        ours.model.state_dict().items(), network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-8, msg=name)
    if sparsifier is not None:
        assert ours.sparsifier is not None
        assert slim.sparsifier is not None
        for name, mask in ours.sparsifier.masks.items():
            assert torch.equal(mask, slim.sparsifier.masks[name])
            assert torch.equal(dict(network.named_parameters())[name] == 0, ~mask)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("penalties", PENALISED)
def test_every_penalty_acts_as_in_our_loop(penalties: dict[str, Any], optimizer: str) -> None:
    check(candidate(optimizer, penalties=penalties), penalties, None)


@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_every_sparsifier_acts_as_in_our_loop(name: str) -> None:
    penalties = {"layer": {"strength": 0.01}} if name != "channels" else {}
    wanted = candidate("sgd", sparsifier=SPARSE[name], penalties=penalties)
    check(wanted, penalties, SPARSE[name])


def test_all_penalties_are_tried() -> None:
    assert {name for name, _ in FORMS} == set(PENALTIES)
