import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slimfront import Candidate, train
from slimfront.trainables.errors import TrialFailure
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.sparsifiers import SPARSIFIERS
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.training.loop import Training
from tests.conftest import SMALL_CANDIDATE


def with_changes(**changes: Any) -> Candidate:
    return Candidate.model_validate(SMALL_CANDIDATE | changes)


def test_training_learns_the_digits() -> None:
    trained = train(
        with_changes(training={"epochs": 8, "lr": 0.01, "seed": 0}, penalties={}, sparsifier=None)
    )
    assert trained.measures["val_accuracy"] > 0.9
    assert [epoch["epoch"] for epoch in trained.history] == list(range(1, 9))
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"] / 2


def test_a_seed_decides_everything(candidate: Candidate) -> None:
    torch.manual_seed(1)
    first = train(candidate)
    torch.manual_seed(2)  # the global generator has no part in it
    second = train(candidate)
    assert first.history == second.history
    assert first.measures == second.measures
    other = train(with_changes(training=SMALL_CANDIDATE["training"] | {"seed": 8}))
    assert other.history != first.history


def test_training_leaves_the_global_random_state_alone(candidate: Candidate) -> None:
    before = torch.random.get_rng_state()
    train(candidate)
    assert torch.equal(torch.random.get_rng_state(), before)


AUGMENTED = {
    "name": "factory",
    "factory": "tests.trainables.data.made:image_tensors",
    "args": {"count": 300},
    "augment": {"crop": 2, "flip": True},
}


@pytest.mark.parametrize("data", ["digits", AUGMENTED], ids=["digits", "augmented images"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_saved_training_continues_bit_exactly(optimizer: str, data: Any, tmp_path: Any) -> None:
    training = {"epochs": 4, "batch_size": 128, "lr": 0.01, "seed": 1, "optimizer": optimizer}
    options = with_changes(training=training, data=data)
    whole = train(options)
    first = Training(options)
    history = [first.run_epoch(), first.run_epoch()]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Training(options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    history += [second.run_epoch(), second.run_epoch()]
    assert history == whole.history
    assert second.finish().measures == whole.measures


def test_the_sparsity_target_is_met_and_measured_on_the_compact_network() -> None:
    trained = train(with_changes(penalties={}, sparsifier={"name": "magnitude", "sparsity": 0.9}))
    weights = 64 * 16 + 2 * 16 * 16 + 16 * 10
    assert trained.history[-1]["sparsity"] == pytest.approx(0.9, abs=1 / weights)
    assert trained.measures["nonzero_params"] <= math.ceil(0.1 * weights) + 3 * 16 + 10


def test_a_strong_layer_penalty_leaves_two_weight_layers_with_the_same_accuracy() -> None:
    trained = train(with_changes(penalties={"layer": {"strength": 1000.0}}, sparsifier=None))
    assert trained.history[-1]["active_layers"] == 0
    assert trained.measures["layers"] == 2
    assert trained.measures["layers_merged"] == 2
    assert trained.measures["val_accuracy"] == trained.history[-1]["val_accuracy"]


def test_the_cka_penalty_is_part_of_the_loss_and_changes_the_weights() -> None:
    plain = train(with_changes(penalties={}, sparsifier=None))
    pushed = train(
        with_changes(
            penalties={"cka": {"strength": 0.1, "every": 1, "samples": -1}}, sparsifier=None
        )
    )
    assert all(epoch["penalty_loss"] == 0 for epoch in plain.history)
    assert all(epoch["penalty_loss"] > 0 for epoch in pushed.history)
    assert pushed.history[-1]["train_loss"] != plain.history[-1]["train_loss"]


def test_strength_zero_is_the_same_as_no_penalty() -> None:
    off = train(with_changes(penalties={"layer": {"strength": 0}, "cka": {"strength": 0}}))
    none = train(with_changes(penalties={}))
    assert off.history == none.history


SPARSIFIER_OPTIONS: dict[str, dict[str, Any]] = {
    name: {"name": name}
    | ({"every": 4} if "every" in cls.model_fields else {})
    | ({} if name == "nm" else {"sparsity": 0.8})
    for name, cls in SPARSIFIERS.items()
}
SPARSIFIER_OPTIONS["lottery"]["rounds"] = 1
SPARSIFIER_OPTIONS["channels"]["sparsity"] = 0.5  # of channels, not of weights


@pytest.mark.parametrize("penalty", ["none", "layer", "cka", "aug_cka"])
@pytest.mark.parametrize("name", sorted(SPARSIFIERS))
def test_every_sparsifier_trains_with_every_kind_of_penalty_and_continues_bit_exactly(
    name: str, penalty: str
) -> None:
    penalties = (
        {} if penalty == "none" else {penalty: {"strength": 1.0 if penalty == "layer" else 0.001}}
    )
    training = {"epochs": 4, "batch_size": 128, "lr": 0.01, "seed": 1, "schedule": "cosine"}
    options = with_changes(
        training=training, penalties=penalties, sparsifier=SPARSIFIER_OPTIONS[name]
    )
    whole = train(options)
    expected = {"nm": 0.5, "channels": 0.4}.get(name, 0.8)
    assert whole.history[-1]["sparsity"] == pytest.approx(expected, abs=0.1)
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"]
    first, second = Training(options), Training(options)
    history = [first.run_epoch(), first.run_epoch()]
    second.load_state_dict(first.state_dict())
    history += [second.run_epoch(), second.run_epoch()]
    assert history == whole.history
    assert second.finish().measures == whole.measures


def test_a_diverging_training_fails_with_its_reason() -> None:
    with pytest.raises(TrialFailure, match=r"diverged: the training loss is (inf|nan) in epoch 1"):
        train(with_changes(training={"epochs": 3, "lr": 1e30, "seed": 0}))


def test_no_hook_is_left_after_training(candidate: Candidate) -> None:
    training = Training(candidate)
    training.run_epoch()
    for penalty in training.penalties:
        penalty.before_batch(0, 1.0)
    assert any(module._forward_hooks for module in training.model.modules())
    training.close()
    assert not any(module._forward_hooks for module in training.model.modules())


def test_the_cosine_schedule_falls_from_lr_to_zero() -> None:
    options = with_changes(
        training={"epochs": 4, "batch_size": 128, "lr": 0.01, "seed": 1, "schedule": "cosine"}
    )
    rates = [epoch["lr"] for epoch in train(options).history]
    assert rates == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * e / 4)) / 2 for e in (1, 2, 3, 4)]
    )


def test_the_dense_candidate_has_the_full_network(candidate: Candidate) -> None:
    measures = train(candidate.dense()).measures
    assert measures["params"] == 64 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 10 + 10
    assert measures["layers"] == 4


def test_augmentation_changes_what_is_trained_on_and_nothing_else() -> None:
    plain = {key: value for key, value in AUGMENTED.items() if key != "augment"}
    training = {"epochs": 4, "batch_size": 32, "lr": 0.01, "seed": 1}
    varied, same = (
        Training(with_changes(data=data, training=training)) for data in (AUGMENTED, plain)
    )
    assert torch.equal(varied.model[1].weight, same.model[1].weight)
    before = varied.augmenter.get_state(), same.augmenter.get_state()
    assert varied.run_epoch()["train_loss"] != same.run_epoch()["train_loss"]
    assert torch.equal(varied.shuffler.get_state(), same.shuffler.get_state())
    assert not torch.equal(varied.augmenter.get_state(), before[0])
    # Nothing is drawn where nothing is varied.
    assert torch.equal(same.augmenter.get_state(), before[1])


def test_training_learns_from_uint8_images_and_compacts_on_what_the_network_sees() -> None:
    training = {"epochs": 10, "batch_size": 32, "lr": 0.01, "seed": 1}
    trained = train(with_changes(data=AUGMENTED, training=training, penalties={}, sparsifier=None))
    assert trained.measures["val_accuracy"] > 0.9
    assert trained.measures["val_accuracy"] == trained.history[-1]["val_accuracy"]


def test_dropout_is_repeatable_and_continues_bit_exactly() -> None:
    def training() -> Training:
        options = {"epochs": 2, "batch_size": 128, "lr": 0.01, "seed": 5}
        return Training(
            with_changes(
                model={"factory": "tests.trainables.test_loop:with_dropout"}, training=options
            )
        )

    torch.manual_seed(1)
    first = training()
    whole = [first.run_epoch(), first.run_epoch()]
    torch.manual_seed(2)
    second = training()
    again = [second.run_epoch()]
    saved = second.state_dict()
    torch.manual_seed(3)
    third = training()
    third.load_state_dict(saved)
    assert [*again, third.run_epoch()] == whole


def with_dropout() -> torch.nn.Module:
    """A network whose training is random."""
    layers = [
        torch.nn.Flatten(),
        torch.nn.Linear(64, 16),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(16, 16),
    ]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 10))


def test_a_strength_for_one_layer_alone_acts() -> None:
    tree = {"layer": {"layers": {"3": 1000.0}}}
    assert train(with_changes(penalties=tree, sparsifier=None)).measures["layers_merged"] == 1
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        with_changes(penalties={"layer": {"layers": {"3": -1.0}}})


def test_a_compact_network_carries_no_hooks(candidate: Candidate) -> None:
    network = train(candidate).compacted.network
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"penalties": {"layer": {"strength": 1.0, "warmup": 3}}},
            "is not shorter than training.epochs",
        ),
        ({"training": {"epochs": 1, "batch_size": 3}}, "set training.batch_size to 4 or more"),
    ],
)
def test_penalties_that_could_never_act_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_changes(**changes)


def too_large(training: Training, most: int) -> list[int]:
    """Makes the network of a training run out of memory on more than `most` examples; the sizes
    that it was given."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            seen.append(len(inputs[0]))
            if len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    training.model.register_forward_pre_hook(hook)
    return seen


def test_out_of_memory_is_met_with_smaller_parts_of_the_batch_and_the_same_gradients() -> None:
    options = {"epochs": 2, "batch_size": 128, "lr": 0.01, "seed": 1, "out_of_memory": "halve"}
    penalties = {"layer": {"strength": 1.0, "form": "gradient"}}
    whole, halved = (
        Training(with_changes(training=options, penalties=penalties)) for _ in range(2)
    )
    seen = too_large(halved, most=40)
    for _ in range(2):
        expected, got = whole.run_epoch(), halved.run_epoch()
        assert got["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
        assert got["penalty_loss"] == pytest.approx(expected["penalty_loss"], rel=1e-3)
    assert seen[:3] == [128, 64, 32]  # tried whole, tried in halves, and then in quarters
    assert max(seen[3:]) == 32
    for a, b in zip(whole.model.parameters(), halved.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    continued = Training(with_changes(training=options, penalties=penalties))
    continued.load_state_dict(halved.state_dict())
    assert continued.parts == 4


def test_out_of_memory_fails_the_trial_unless_it_may_halve_as_one_too_large_example_does() -> None:
    for behaviour, most in (("fail", 40), ("halve", 0)):
        options = {"epochs": 1, "batch_size": 128, "seed": 1, "out_of_memory": behaviour}
        training = Training(with_changes(training=options))
        too_large(training, most)
        with pytest.raises(torch.OutOfMemoryError):
            training.run_epoch()


@pytest.mark.slow
def test_an_int8_candidate_is_measured_as_its_quantised_file() -> None:
    wide = {
        "model": {"name": "mlp", "depth": 2, "width": 128},
        "training": {"epochs": 2, "batch_size": 64, "lr": 0.01, "seed": 1},
    }
    plain = train(with_changes(**wide))
    int8 = train(with_changes(**wide, int8=True))
    assert int8.measures["bytes"] < plain.measures["bytes"]
    assert (
        int8.measures["bytes_sparse"] == int8.measures["bytes"] > int8.measures["bytes_compressed"]
    )
    assert int8.measures["params"] == plain.measures["params"]
    data = Training(with_changes()).data
    quantised = as_int8(int8.compacted.network, data)
    assert int8.measures["val_accuracy"] == quantised.scores(data, "val")["val_accuracy"]
    assert int8.measures["bytes"] == len(quantised.file)
    assert int8.measures["val_accuracy"] == pytest.approx(plain.measures["val_accuracy"], abs=0.05)


def test_times_of_int8_candidates_in_torch_are_refused() -> None:
    with pytest.raises(ValidationError, match="is an ONNX file, which torch does not time"):
        with_changes(int8=True, measures=["speedup"])


def test_extra_measures_are_taken_of_a_network_and_of_those_pruned_from_it() -> None:
    trained = train(
        with_changes(measures=["speedup", "bytes_compressed"], one_shot={"steps": 1, "keep": 0.9})
    )
    assert trained.pruned
    for network in (trained, *trained.pruned):
        assert network.measures["speedup"] > 0
        assert 0 < network.measures["bytes_compressed"] <= network.measures["bytes"]
        assert "latency_ms" not in network.measures


def test_a_transformer_loses_heads_continues_bit_exactly_and_ships_without_them(
    tmp_path: Any,
) -> None:
    candidate = with_changes(
        model={"factory": "tests.trainables.networks:Transformer"},
        training={"epochs": 4, "batch_size": 128, "lr": 0.01, "seed": 1},
        penalties={"channel": {"strength": 0.02}},
        sparsifier={
            "name": "channels",
            "sparsity": 0.5,
            "of": "channels",
            "compare": "group",
            "every": 2,
        },
        refit={"epochs": 1},
    )
    whole = train(candidate)
    first = Training(candidate)
    history = [first.run_epoch(), first.run_epoch()]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Training(candidate)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    history += [second.run_epoch(), second.run_epoch()]
    finished = second.finish()
    assert [*history, *finished.history] == whole.history
    assert finished.measures == whole.measures
    assert whole.measures["val_accuracy"] > 0.5
    heads = [
        module.heads
        for module in whole.compacted.network.modules()
        if isinstance(module, Attention)
    ]
    assert heads == [2, 2]
    assert whole.compacted.report.count("heads removed") == 2


@pytest.mark.parametrize(
    ("asked", "batch_size", "epochs"),
    [(3, 64, 3), ("auto", 1078, 2000), ("auto", 64, 118), ("auto", 4, 8)],
)
def test_reports_come_every_so_many_epochs_or_after_two_thousand_steps(
    asked: object, batch_size: int, epochs: int
) -> None:
    options = {"epochs": 4000, "batch_size": batch_size, "report_every": asked}
    assert Training(with_changes(training=options)).report_every == epochs


def test_a_report_comes_after_at_least_one_epoch() -> None:
    with pytest.raises(ValidationError, match="at least 1 epoch, and it is 0"):
        with_changes(training={"report_every": 0})
