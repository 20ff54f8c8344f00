"""Slimming in Lightning's real Trainer.

Lightning takes seconds to import, and is when a test here runs: every process of the suite
collects this file.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimfront as sf
from tests.marks import often

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS[:, :3].argmax(1)


@functools.cache
def classifier() -> type:
    """The class of the networks that are trained."""
    import lightning

    class Classifier(lightning.LightningModule):
        """A perceptron, as people write them."""

        def __init__(self, by_hand: bool) -> None:
            super().__init__()
            self.model = nn.Sequential(
                nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
            )
            self.automatic_optimization = not by_hand

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

        def training_step(self, batch: Any, _number: int) -> dict[str, Tensor]:
            x, y = batch
            loss = nn.functional.cross_entropy(self(x), y)
            self.log("train_loss", loss)
            return {"loss": loss}

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)]

    return Classifier


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=16)


def trainer(folder: Path, callback: Any, epochs: int = 6, **options: Any) -> Any:
    import lightning

    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **({"enable_checkpointing": False} | options),
    )


def callback(**options: Any) -> Any:
    from slimfront.integrations.lightning import SlimmingCallback

    asked = {
        "penalties": {"layer": {"strength": 1.0}, "cka": {"strength": 0.1, "every": 2}},
        "sparsifier": {"name": "channels", "sparsity": 0.5, "every": 2},
    }
    return SlimmingCallback(INPUTS, **(asked | options))


def new(by_hand: bool = False) -> Any:
    torch.manual_seed(0)
    return classifier()(by_hand)


@pytest.mark.parametrize("name", [None, "model"])
@pytest.mark.parametrize("parts", often([1, 2], 2))
def test_the_compact_network_comes_out(tmp_path: Path, name: str | None, parts: int) -> None:
    module, slimming = new(), callback(network=name)
    trainer(tmp_path, slimming, accumulate_grad_batches=parts).fit(module, loader())
    slim = slimming.slimmed.slim
    assert slim is not None
    assert slim.step == slim.steps == 24 // parts
    small = slimming.compact()
    assert small.measures["params"] < 0.7 * sum(p.numel() for p in module.parameters())
    torch.testing.assert_close(small.network(INPUTS), module.eval()(INPUTS), rtol=1e-4, atol=1e-5)
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.modules())


def test_an_average_of_weights_is_as_small_as_the_network(tmp_path: Path, caplog: Any) -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    module, slimming = new(), callback(penalties={})
    fitting = trainer(tmp_path, slimming)
    fitting.callbacks.append(WeightAveraging())
    fitting.fit(module, loader())
    assert "were zeroed again" in "".join(_said(slimming, caplog))
    small = slimming.compact()
    assert small.measures["params"] < 0.7 * sum(p.numel() for p in module.parameters())


def _said(slimming: Any, caplog: Any) -> list[str]:
    slimming.compact()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_inputs_have_the_precision_of_the_batches(tmp_path: Path, precision: Any) -> None:
    module, slimming = new(), callback(penalties={})
    trainer(tmp_path, slimming, precision=precision).fit(module, loader())
    for inputs in (None, INPUTS):
        small = slimming.compact(inputs)
        assert small.measures["params"] < 0.7 * sum(p.numel() for p in module.parameters())


def test_a_second_fit_goes_on_from_the_first(tmp_path: Path) -> None:
    module, slimming = new(), callback()
    fitting = trainer(tmp_path, slimming, epochs=4)
    fitting.fit(module, loader())
    masks = {name: mask.clone() for name, mask in slimming.slimmed.slim.sparsifier.masks.items()}
    fitting.fit_loop.max_epochs = 6
    fitting.fit(module, loader())
    slim = slimming.slimmed.slim
    assert slim.step == slim.steps == 24
    for name, mask in slim.sparsifier.masks.items():
        assert not (mask & ~masks[name]).any()  # what had gone stayed away
    anew = callback()
    fitting.callbacks[fitting.callbacks.index(slimming)] = anew
    fitting.fit_loop.max_epochs = 7
    with pytest.raises(sf.UserError, match="goes on from step 24, and this callback has no state"):
        fitting.fit(module, loader())


def test_the_last_group_of_batches_is_a_step_of_its_epoch(tmp_path: Path) -> None:
    slimming = callback()
    trainer(tmp_path, slimming, accumulate_grad_batches=3, epochs=2).fit(new(), loader())
    slim = slimming.slimmed.slim
    assert [slim.steps, slim.steps_per_epoch] == [4, 2]


def test_it_trains_as_a_plain_loop_with_slimming(tmp_path: Path) -> None:
    module = new()
    trainer(tmp_path, callback()).fit(module, loader())
    plain = new()
    (optimizer,), (schedule,) = plain.configure_optimizers()
    slim = sf.Slimming(
        plain,
        optimizer,
        INPUTS,
        steps=24,
        penalties={"layer": {"strength": 1.0}, "cka": {"strength": 0.1, "every": 2}},
        sparsifier={"name": "channels", "sparsity": 0.5, "every": 2},
    )
    for _ in range(6):
        for x, y in loader():
            loss = nn.functional.cross_entropy(plain(x), y) + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        schedule.step()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("sparsifier", ["channels", "rigl", "snip"])
def test_it_goes_on_from_a_checkpoint_bit_exactly(tmp_path: Path, sparsifier: str) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    asked: dict[str, Any] = {"name": sparsifier, "sparsity": 0.5}
    if sparsifier != "snip":
        asked["every"] = 2

    def made() -> Any:
        return callback(sparsifier=asked, targets=TARGETS, loss=nn.functional.cross_entropy)

    whole = new()
    keeping = ModelCheckpoint(tmp_path, save_top_k=-1)
    first = trainer(tmp_path, made(), enable_checkpointing=True)
    first.callbacks.append(keeping)
    first.fit(whole, loader())
    other = new()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    trainer(tmp_path, made()).fit(other, loader(), ckpt_path=str(tmp_path / "epoch=2-step=12.ckpt"))
    for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for module, slimming, said in (
        (new(by_hand=True), callback(), "optimises by hand"),
        (new(), callback(network="net"), "has no network 'net'; it has model"),
        (new(), callback(penalties={"block": {"strength": 1.0}}), "no residual branch"),
    ):
        with pytest.raises(sf.UserError, match=said):
            trainer(tmp_path, slimming).fit(module, loader())
    with pytest.raises(sf.UserError, match="training has not begun"):
        callback().compact()


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        while True:
            yield from zip(INPUTS, TARGETS, strict=True)


def test_data_without_a_length_needs_steps_of_an_epoch_for_a_warmup_alone(tmp_path: Path) -> None:
    endless: Any = DataLoader(Endless(), batch_size=16)
    module, slimming = new(), callback()
    trainer(tmp_path, slimming, epochs=-1, max_steps=8).fit(module, endless)
    assert slimming.compact().measures["params"] < sum(p.numel() for p in module.parameters())
    rising = {"layer": {"strength": 1.0, "warmup": 1}}
    with pytest.raises(sf.UserError, match="give steps_per_epoch"):
        trainer(tmp_path, callback(penalties=rising), epochs=-1, max_steps=8).fit(new(), endless)
    given = callback(penalties=rising, steps_per_epoch=4)
    trainer(tmp_path, given, epochs=-1, max_steps=8).fit(new(), endless)
    assert given.slimmed.slim.steps_per_epoch == 4


def test_accumulation_that_changes_needs_the_number_of_steps(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    def fit(slimming: Any) -> Any:
        fitting = trainer(tmp_path, slimming)
        fitting.callbacks.append(GradientAccumulationScheduler({0: 1, 2: 4}))
        fitting.fit(new(), loader())
        return slimming.slimmed.slim

    with pytest.raises(sf.UserError, match="give SlimmingCallback steps="):
        fit(callback())
    slim = fit(callback(steps=12))
    assert slim.step == slim.steps == 12


def test_two_networks_of_a_module_have_a_callback_each(tmp_path: Path) -> None:
    from slimfront.integrations.lightning import SlimmingCallback

    kinds = [SlimmingCallback(INPUTS, network=name) for name in (None, "model", "other")]
    assert len({kind.state_key for kind in kinds}) == 3
