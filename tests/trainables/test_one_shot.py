import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.sparsifiers.base import prunable_weights
from slimfront.trainables.tasks.metrics import Described
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.one_shot import OneShot, Pruning
from slimfront.trainables.training.rivals import Rivals
from slimfront.trainables.training.train import train


def prune(network: nn.Module, inputs: torch.Tensor, options: OneShot) -> Iterator[nn.Module]:
    """The network at each level, sparser and sparser."""
    pruning = Pruning(network, inputs)
    return map(pruning.at, pruning.levels(options))


def nonzeros(network: nn.Module) -> list[int]:
    return [
        int(m.weight.count_nonzero())
        for m in network.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]


def test_each_step_keeps_its_share_of_weights_not_zero_and_leaves_the_network_alone() -> None:
    network = nn.Sequential(nn.Linear(10, 20), nn.Flatten(), nn.Linear(20, 5)).eval()
    with torch.no_grad():
        network[0].weight[:10] = 0  # 100 of its weights are left
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sparser = [
        copy.deepcopy(n)
        for n in prune(network, torch.rand(8, 10) + 0.1, OneShot(steps=3, keep=0.5))
    ]
    assert sum(nonzeros(network)) == 200
    assert [sum(nonzeros(n)) for n in sparser] == [100, 50, 25]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
        if name.endswith("bias"):
            assert all(torch.equal(n.state_dict()[name], tensor) for n in sparser)


def slow_scores(network: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """|w_ij| · sqrt(Σ x_j²), one weight at a time, as arXiv 2306.11695 eq. 1 has it."""
    scores = {}
    with torch.no_grad():
        for name, layer in network.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                score = torch.zeros_like(layer.weight)
                outputs_per_group = layer.weight.shape[0] // getattr(layer, "groups", 1)
                for i in range(layer.weight.shape[0]):
                    for j in range(layer.weight.shape[1]):
                        channel = j + (i // outputs_per_group) * layer.weight.shape[1]
                        score[i, j] = (
                            layer.weight[i, j].abs() * (inputs[:, channel] ** 2).sum().sqrt()
                        )
                scores[name] = relative(score)
            inputs = layer(inputs)
    return scores


def relative(score: torch.Tensor) -> torch.Tensor:
    """Each squared score over the sum of those of its layer that are as large or larger."""
    squares = score.square()
    made = torch.zeros_like(score)
    for place in range(score.numel()):
        own = squares.flatten()[place]
        made.view(-1)[place] = own / squares[squares >= own].sum()
    return made


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (16, 6)),
        (
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8)),
            (4, 4, 7, 7),
        ),
    ],
    ids=["linear", "grouped and depthwise convolutions"],
)
def test_the_weights_with_the_largest_scores_of_the_whole_network_stay(
    network: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network, inputs = (
        network.double().eval(),
        torch.randn(shape, dtype=torch.float64)
        * torch.arange(1.0, shape[1] + 1).view(-1, *[1] * (len(shape) - 2)),
    )
    scores = slow_scores(network, inputs)
    flat = torch.cat([s.flatten() for s in scores.values()])
    alive = int((flat > 0).sum())
    for step, sparser in enumerate(prune(network, inputs, OneShot(steps=3, keep=0.6)), start=1):
        threshold = flat.sort(descending=True).values[int(alive * 0.6**step) - 1]
        for name, score in scores.items():
            kept = sparser.get_submodule(name).weight != 0
            assert torch.equal(kept, score >= threshold * (1 - 1e-12))


def test_the_last_layer_of_a_convolutional_network_does_not_go_whole() -> None:
    """It sees one place of each example, and the first one hundreds."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    for sparser in prune(network, torch.rand(16, 3, 20, 20), OneShot(steps=3, keep=0.5)):
        assert min(nonzeros(sparser)) > 0


@pytest.mark.parametrize("kind", ["linear", "convolutional", "depthwise"])
def test_layers_are_fitted_to_what_they_gave(kind: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 3, 8, 8)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    ).eval()
    if kind == "linear":
        network = nn.Sequential(
            *(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 5))
        ).eval()
    elif kind == "depthwise":
        network[2] = nn.Conv2d(8, 8, 3, groups=8).eval()
    plain = Pruning(network, inputs)
    corrected = Pruning(network, inputs, correct=True)
    (kept,) = plain.levels(OneShot(steps=1, keep=0.5))
    wanted = network(inputs).detach()

    def apart(made: torch.Tensor) -> float:
        return float((made.detach() - wanted).square().mean())

    assert apart(corrected.at(kept)(inputs)) < 0.75 * apart(plain.at(kept)(inputs))
    assert nonzeros(corrected.at(kept)) == nonzeros(plain.at(kept))
    # And again from another level: nothing of it is left.
    again = corrected.at(kept)(inputs)
    corrected.at(kept // 2)
    assert torch.equal(corrected.at(kept)(inputs), again)
    assert torch.equal(corrected.at(kept, corrected=False)(inputs), plain.at(kept)(inputs))


def test_layers_that_are_called_twice_or_of_one_weight_are_not_fitted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
            self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6)
            self.d.weight = self.c.weight
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(self.a(x)))
            out: torch.Tensor = self.head(self.d(self.c(x).relu()))
            return out

    pruning = Pruning(Twice().eval(), torch.randn(8, 6), correct=True)
    assert pruning.correction is not None
    assert pruning.correction.names == {"b", "head"}


def test_it_ends_where_there_is_nothing_more_to_drop() -> None:
    network = nn.Linear(2, 2).eval()
    assert [
        sum(nonzeros(n)) for n in prune(network, torch.ones(1, 2), OneShot(steps=99, keep=0.5))
    ] == [2, 1]
    assert list(prune(nn.ReLU(), torch.ones(1, 2), OneShot())) == []


def candidate(**parts: object) -> Candidate:
    return Candidate.model_validate(
        {
            "model": {"name": "mlp", "depth": 3, "width": 32},
            "training": {"epochs": 8, "lr": 1e-2, "seed": 3},
            **parts,
        }
    )


def test_the_pruned_networks_of_a_training_shrink_are_compact_and_measured_as_they_are() -> None:
    training = Training(candidate(one_shot={"steps": 5, "keep": 0.7, "refine": 0}))
    while not training.done:
        training.run_epoch()
    trained = training.finish()
    assert len(trained.pruned) >= 2
    sizes = [n.measures["nonzero_params"] for n in (trained, *trained.pruned)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    inputs, labels = training.data.validation
    for pruned in trained.pruned:
        network = pruned.compacted.network
        right = (network(training.data.prepare(inputs)).argmax(1) == labels).double().mean()
        assert pruned.measures["val_accuracy"] == pytest.approx(float(right))
        assert pruned.measures["nonzero_params"] == sum(
            int(p.count_nonzero()) for p in network.parameters()
        )
        assert pruned.measures["val_accuracy"] >= trained.measures["val_accuracy"] / 2
    # Units that went dead are gone.
    assert trained.pruned[-1].measures["params"] < trained.measures["params"]


def test_pruning_changes_nothing_of_the_training_nor_of_what_was_measured_before() -> None:
    with_it, without = train(candidate()), train(candidate(one_shot={"steps": 0}))
    assert with_it.measures == without.measures
    assert with_it.history == without.history
    assert with_it.pruned
    assert not without.pruned
    assert not train(candidate().dense()).pruned


def test_it_works_on_a_network_as_it_is_where_compaction_is_off() -> None:
    trained = train(
        candidate(compaction={"enabled": False}, one_shot={"steps": 1, "keep": 0.5, "refine": 0})
    )
    (pruned,) = trained.pruned
    assert pruned.measures["params"] == trained.measures["params"]
    assert pruned.measures["nonzero_params"] < 0.6 * trained.measures["nonzero_params"]


def test_zero_units_that_stay_are_warned_of_once_and_not_for_each_network(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training(Candidate.model_validate({"one_shot": {"steps": 8}}), "cpu")
    flat = [module for module in training.model.modules() if isinstance(module, nn.Linear)]
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(flat[0].in_features, 12), nn.Softmax(1), nn.Linear(12, 10)
    )
    with torch.no_grad():
        network[1].weight[:3] = 0
        network[1].bias[:3] = 0
        trained = training.finishing.finish(network, 1, None, one_shot=True)
        training.finishing.finish(network, 2, None, one_shot=False)
    training.close()
    stays = [n for n in (trained, *trained.pruned) if n.compacted.report.count("zeros stay")]
    assert len(stays) > 1
    assert caplog.text.count("units without a weight stay") == 1


def test_pruned_networks_recover_for_some_epochs() -> None:
    """Each becomes better than it was without them, keeps its zeros, and says what it cost."""

    def pruned(recover: int) -> list[dict[str, float]]:
        one_shot = {"steps": 3, "keep": 0.3, "refine": 0, "recover": recover}
        made = train(candidate(one_shot=one_shot, refit={"lr": 3e-3}))
        return [dict(network.measures) for network in made.pruned]

    without, with_recovery = pruned(0), pruned(2)
    assert without
    assert len(with_recovery) >= len(without)
    for before, after in zip(without, with_recovery, strict=False):
        assert "recovery_epochs" not in before
        assert after["recovery_epochs"] == 2
        assert after["nonzero_params"] <= before["nonzero_params"]
        assert after["val_accuracy"] > before["val_accuracy"]


def test_refinement_closes_in_on_the_smallest_network_that_is_about_as_good() -> None:
    training = Training(candidate(one_shot={"steps": 5, "keep": 0.5, "refine": 6}))
    while not training.done:
        training.run_epoch()
    trained = training.finish()
    bound = trained.measures["val_accuracy"] - 0.01
    shares = [n.measures["one_shot_share"] for n in trained.pruned]
    *steps, refined = trained.pruned
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    as_good = [n.measures["val_accuracy"] >= bound for n in steps]
    good = min([1.0, *(s for s, is_good in zip(shares, as_good, strict=False) if is_good)])
    bad = max(s for s, is_good in zip(shares, as_good, strict=False) if not is_good)
    assert refined.measures["val_accuracy"] >= bound
    assert bad < shares[-1] < good
    # The same by hand, with each network on the way compacted and measured.
    seen = training.data.prepare(training.data.train.inputs[:1024])
    alive = Pruning(trained.compacted.network, seen).alive
    low, high = round(bad * alive), round(good * alive)
    for _ in range(6):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        found = training.finishing.pruned_to(trained, middle / alive)
        if found.measures["val_accuracy"] >= bound:
            high = middle
        else:
            low = middle
    training.close()
    assert round(shares[-1] * alive) == high


def test_what_the_front_beats_is_not_evaluated_and_the_others_are_what_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training(candidate(one_shot={"steps": 8, "keep": 0.8, "refine": 0}))
    while not training.done:
        training.run_epoch()
    free = training.finish()
    third = free.pruned[2].measures
    rival = {"val_accuracy": 1.0, "nonzero_params": third["nonzero_params"] - 1}
    training.finishing.rivals = Rivals((rival,))
    evaluated: list[int] = []
    measures = training.finishing._measures

    def seen(network: nn.Module, *rest: Any) -> dict[str, float]:
        evaluated.append(sum(nonzeros(network)))
        return measures(network, *rest)

    monkeypatch.setattr(training.finishing, "_measures", seen)
    held = training.finish()
    training.close()
    assert held.measures == free.measures
    assert [network.step for network in free.pruned] == list(range(1, len(free.pruned) + 1))
    smaller = [n for n in free.pruned if n.measures["nonzero_params"] < third["nonzero_params"]]
    assert len(smaller) > 1
    found = [(network.step, network.measures) for network in held.pruned]
    assert found == [(network.step, network.measures) for network in smaller]
    assert len(evaluated) == 1 + len(smaller)  # the network itself, and what may join


ACCURACY, ERROR = Described("accuracy", "larger", bounded=True), Described("mse", "smaller")


@pytest.mark.parametrize(
    ("rival", "quality", "at_best", "beaten"),
    [
        ({"val_accuracy": 0.9, "params": 100}, ACCURACY, 0.9, True),  # it is smaller
        ({"val_accuracy": 0.9, "params": 200}, ACCURACY, 0.9, False),  # as good in all
        ({"val_accuracy": 0.91, "params": 200}, ACCURACY, 0.9, True),
        ({"val_accuracy": 0.95, "params": 201}, ACCURACY, 0.9, False),
        ({"val_accuracy": 0.8, "params": 1}, ACCURACY, 0.9, False),
        ({"val_accuracy": 0.95, "params": 100, "layers": 4}, ACCURACY, 0.9, False),
        ({"val_accuracy": 0.95, "params": 100, "layers": 3}, ACCURACY, 0.9, True),
        ({"val_mse": 0.5, "params": 200}, ERROR, 0.6, True),
        ({"val_mse": 0.7, "params": 100}, ERROR, 0.6, False),
        ({"val_f1": 0.95, "params": 1}, ACCURACY, 0.9, False),  # judged by another metric
        ({"val_accuracy": math.nan, "params": 1}, ACCURACY, 0.9, False),
        ({"val_accuracy": 0.95, "params": 1}, ACCURACY, math.nan, False),
    ],
)
def test_rivals_beat_what_they_dominate_at_its_best(
    rival: dict[str, float], quality: Described, at_best: float, *, beaten: bool
) -> None:
    sizes = {"params": 200.0, "layers": 3.0}
    assert Rivals((rival,)).beat(quality, at_best, sizes) is beaten


def test_nothing_is_refined_where_every_step_is_about_as_good() -> None:
    options = candidate(one_shot={"steps": 2, "keep": 0.99, "refine": 4}).model_copy(
        update={"tolerance": 1.0}
    )
    assert len(train(options).pruned) == 2


def test_a_level_can_be_gone_back_to() -> None:
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    pruning = Pruning(network, torch.rand(8, 10) + 0.1)
    first = {name: tensor.clone() for name, tensor in pruning.at(200).state_dict().items()}
    assert sum(nonzeros(pruning.at(20))) == 20
    again = pruning.at(200).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(6, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(x)
        made: Tensor = self.head(outputs[:, -1])
        return made


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Recurrent(), torch.randn(8, 5, 6)),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, groups=2)),
            torch.randn(8, 3, 6, 6),
        ),
        (nn.LSTMCell(6, 4), torch.randn(8, 6)),
    ],
    ids=["GRU", "transposed", "cell"],
)
def test_each_step_keeps_its_share_of_all_weights_whatever_layers_they_are_of(
    network: nn.Module, inputs: Tensor
) -> None:
    weights = prunable_weights(network)
    total = sum(weight.numel() for weight in weights.values())
    pruning = Pruning(network.eval(), inputs, correct=True)
    assert pruning.alive == total
    sparser = prunable_weights(pruning.at(total // 4))
    kept = {name: int(weight.count_nonzero()) for name, weight in sparser.items()}
    assert sum(kept.values()) == total // 4
    assert all(kept[name] < weight.numel() for name, weight in weights.items())
