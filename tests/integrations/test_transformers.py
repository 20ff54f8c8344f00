"""Slimming in Hugging Face's real Trainer, on a tiny model from a config.

Their library takes seconds to import, and is when a test here runs: every process of the suite
collects this file.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimfront as sf
from tests.marks import often

FILE = "slimming.pt"
"""The file of a checkpoint that slimming goes on from."""


def example(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 30, (8,), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(8, dtype=torch.long),
        "labels": (ids % 2).sum() > 4,
    }


EXAMPLES = [{**example(n), "labels": example(n)["labels"].long()} for n in range(32)]
INPUTS = {
    name: torch.stack([one[name] for one in EXAMPLES]) for name in ("input_ids", "attention_mask")
}


def new() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def trainer(folder: Path, model: Any, slimming: Any, **options: Any) -> Any:
    import transformers

    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    kind = options.pop("kind", transformers.Trainer)
    data = options.pop("train_dataset", EXAMPLES)
    evaluated = options.pop("eval_dataset", None)
    return kind(
        model=model,
        args=transformers.TrainingArguments(**(arguments | options)),
        train_dataset=data,
        eval_dataset=evaluated,
        callbacks=[slimming],
    )


def callback(**options: Any) -> Any:
    from slimfront.integrations.transformers import SlimmingCallback

    asked: dict[str, Any] = {
        "penalties": {"connection": {"strength": 0.01}},
        "sparsifier": {"name": "channels", "sparsity": 0.4, "every": 2},
    }
    return SlimmingCallback(INPUTS, **(asked | options))


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("parts", often([1, 2], 2))
def test_the_compact_network_comes_out(tmp_path: Path, parts: int) -> None:
    model, slimming = new(), callback()
    trainer(tmp_path, model, slimming, gradient_accumulation_steps=parts).train()
    slim = slimming.slimmed.slim
    assert slim is not None
    assert slim.step == slim.steps == 16 // parts
    small = slimming.compact()
    assert small.measures["params"] < size(model)
    with torch.no_grad():
        wanted = model.eval()(**INPUTS).logits
        made = small.network(**INPUTS)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert not model._forward_hooks


CKA = {
    "cka": {
        "strength": 0.1,
        "every": 1,
        "stages": [["bert.encoder.layer.0.output", "bert.encoder.layer.1.output"]],
    }
}


@pytest.mark.parametrize("epochs", [0.5, 2.5])
def test_an_epoch_has_the_steps_that_it_has_whatever_is_trained_of_it(
    tmp_path: Path, epochs: float
) -> None:
    slimming = callback()
    trainer(tmp_path, new(), slimming, num_train_epochs=epochs).train()
    slim = slimming.slimmed.slim
    assert [slim.steps, slim.steps_per_epoch] == [4 * epochs, 4]


def test_mixed_precision_is_the_same_network(tmp_path: Path) -> None:
    model, slimming = new(), callback()
    trainer(tmp_path, model, slimming, num_train_epochs=1, bf16=True).train()
    small = slimming.compact()
    assert small.measures["params"] < size(model)


def test_a_loss_of_the_penalties_is_added(tmp_path: Path) -> None:
    plain, slimmed = (new() for _ in range(2))
    trainer(tmp_path, plain, callback(penalties=None, sparsifier=None)).train()
    trainer(tmp_path, slimmed, callback(penalties=CKA, sparsifier=None)).train()
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.parameters(), slimmed.parameters(), strict=True)
    )


def test_a_trainer_that_uses_another_loss_is_refused(tmp_path: Path) -> None:
    import transformers

    class LossOfItsOwn(transformers.Trainer):
        """Does not use the loss of the model."""

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels = inputs["labels"]
            return torch.nn.functional.cross_entropy(model(**inputs).logits, labels)

    network = new()
    with pytest.raises(sf.UserError, match="the trainer has not used that"):
        trainer(tmp_path, network, callback(penalties=CKA), kind=LossOfItsOwn).train()
    assert not any(module._forward_hooks for module in network.modules())


def test_a_trainer_that_takes_the_labels_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sf.UserError, match="the trainer has not used that"):
        trainer(tmp_path, new(), callback(penalties=CKA), label_smoothing_factor=0.1).train()


def test_it_goes_on_from_a_checkpoint_bit_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    asked = {"name": "rigl", "sparsity": 0.5, "every": 3}
    whole = new()
    trainer(tmp_path / "whole", whole, callback(sparsifier=asked), **options).train()
    assert (tmp_path / "whole" / "checkpoint-6" / FILE).is_file()
    other = new()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    trainer(tmp_path / "whole", other, callback(sparsifier=asked), **options).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6")
    )
    for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_without_its_state_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    trainer(tmp_path, new(), callback(), **options).train()
    folder = tmp_path / "checkpoint-8"
    (folder / FILE).unlink()
    with pytest.raises(sf.UserError, match=rf"there is no {FILE} in"):
        trainer(tmp_path, new(), callback(), **options).train(resume_from_checkpoint=str(folder))


KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "BertForTokenClassification": ("BertConfig", {"intermediate_size": 32}),
    "GPT2LMHeadModel": ("GPT2Config", {"n_positions": 32}),
    "DistilBertForTokenClassification": ("DistilBertConfig", {"hidden_dim": 32}),
    "LlamaForCausalLM": ("LlamaConfig", {"intermediate_size": 32}),
    "RobertaForTokenClassification": ("RobertaConfig", {"intermediate_size": 32}),
}


@pytest.mark.parametrize("kind", often(KINDS, "BertForTokenClassification", "GPT2LMHeadModel"))
def test_compact_networks_take_sequences_of_any_length(kind: str) -> None:
    import transformers

    config, options = KINDS[kind]
    torch.manual_seed(0)
    network = getattr(transformers, kind)(
        getattr(transformers, config)(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    asked = {"name": "channels", "sparsity": 0.4, "every": 1}
    with sf.Slimming(
        network, optimizer, INPUTS, steps=2, sparsifier=asked, output="logits"
    ) as slim:
        for _ in range(2):
            network(**INPUTS).logits.square().mean().backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
        small = slim.compact()
    network.eval()
    assert size(small.network) < 0.9 * size(network)
    for length in (8, 5, 20):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(3, 30, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length - 2 :] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            wanted, got = network(**given).logits, small.network(**given)
        assert torch.allclose(wanted, got, atol=1e-5 * float(wanted.abs().max()))


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        yield from EXAMPLES * 4


@pytest.mark.parametrize("options", [{}, {"penalties": {"node": {"strength": 1e-3, "warmup": 1}}}])
def test_data_without_a_length_needs_steps_of_an_epoch_for_a_warmup_alone(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = new()

    def train(**more: Any) -> Any:
        slimming = callback(**options, **more)
        made = trainer(tmp_path, model, slimming, max_steps=4, train_dataset=Endless())
        made.train()
        return slimming

    if not options:
        train()
        return
    with pytest.raises(sf.UserError, match="give steps_per_epoch"):
        train()
    assert train(steps_per_epoch=2).slimmed.slim.steps_per_epoch == 2


def test_the_best_checkpoint_has_its_own_masks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = new()
    slimming = callback(penalties=None, sparsifier={"name": "magnitude", "sparsity": 0.9})
    made = trainer(
        tmp_path,
        model,
        slimming,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # which the checkpoint after many steps is not
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        eval_dataset=EXAMPLES,
        learning_rate=1e-2,
    )
    made.train()
    best = int(made.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 16
    small = slimming.compact()
    model.eval()
    with torch.no_grad():
        wanted, got = model(**INPUTS).logits, small.network(**INPUTS)
    assert torch.allclose(wanted, got, atol=1e-4)
    assert any(f"{best} of 16 steps were taken" in said for said in caplog.messages)


def test_outputs_are_of_the_class_that_the_network_returns() -> None:
    network = new().eval()
    for small in (sf.compact(network, INPUTS), sf.prune(network, INPUTS, channels=0.3)):
        made = small.network(**INPUTS)
        assert type(made) is type(network(**INPUTS))
    logits = sf.prune(network, INPUTS, channels=0.3, output="logits").network(**INPUTS)
    assert torch.equal(logits, made.logits)


def test_outputs_that_hold_tensors_unseen_are_refused_with_what_to_do() -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1
    )
    network = transformers.GPT2LMHeadModel(config).eval()
    ids = {"input_ids": INPUTS["input_ids"]}
    for call in (lambda: sf.compact(network, ids), lambda: sf.prune(network, ids, channels=0.3)):
        with pytest.raises(sf.UserError, match="DynamicCache within its CausalLMOutput"):
            call()
    small = sf.prune(network, ids, channels=0.3, output="logits")
    assert small.network(**ids).shape == network(**ids).logits.shape
