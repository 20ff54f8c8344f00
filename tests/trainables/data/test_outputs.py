"""What a teacher makes of the data is computed once per node."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.data.cache import FOLDER, LIMIT, entries, outputs, outputs_once

INPUTS = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in which everything is worth being kept."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(outputs, "WORTHWHILE", 0.0)
    entries.warn_once.cache_clear()
    return tmp_path / "cache"


class Counted:
    """A network that notes what it is asked."""

    def __init__(self, seed: int = 0, factor: float = 1.0) -> None:
        torch.manual_seed(seed)
        self.network = nn.Linear(4, 3).eval()
        self.factor = factor
        self.asked: list[int] = []

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        self.asked.append(len(inputs))
        return self.factor * self.network(inputs)

    def of(self, inputs: Tensor = INPUTS) -> Tensor:
        return outputs_once(self.network, inputs, self)


def test_the_second_asks_for_a_few_only() -> None:
    first, second = Counted(), Counted()
    wanted = first.of()
    assert torch.equal(second.of(), wanted)
    assert first.asked == [256, 1000] and second.asked == [256]
    assert torch.equal(wanted, first(INPUTS))


@pytest.mark.parametrize("other", [Counted(seed=1), Counted(factor=2.0)], ids=["weights", "code"])
def test_another_network_gets_its_own(other: Counted) -> None:
    Counted().of()
    assert torch.equal(other.of(), other(INPUTS))
    assert 1000 in other.asked[:2]


def test_other_inputs_get_their_own() -> None:
    Counted().of()
    changed = INPUTS.clone()
    changed[-1] = 0  # beyond what is asked for first
    assert torch.equal(Counted().of(changed), Counted()(changed))


def test_what_is_quick_or_damaged_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Counted().of()
    (entry,) = folder.glob("*.data")
    content = bytearray(entry.read_bytes())
    content[70_000] ^= 255
    entry.write_bytes(content)
    assert torch.equal(Counted().of(), wanted)
    assert torch.equal(Counted().of(), wanted)
    monkeypatch.setattr(outputs, "WORTHWHILE", 1e9)
    quick = Counted()
    assert torch.equal(quick.of(), wanted)
    assert quick.asked == [256, 1000]


def test_without_room_each_computes_it_and_one_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(LIMIT, "1e-9")
    for _ in range(2):
        teacher = Counted()
        assert torch.equal(teacher.of(), teacher(INPUTS))
        assert teacher.asked == [256, 1000, 1000]  # the last by this test
    (said,) = caplog.messages
    assert "cannot be put into the cache on disk" in said
