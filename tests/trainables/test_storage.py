from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainables.compaction import compact
from trainables.errors import UserError
from trainables.models import MLP
from trainables.storage import check_storable, restore, store


class Moody(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("compacted", [True, False])
def test_a_network_comes_back_bit_identical_compacted_or_not(tmp_path: Path, compacted: bool) -> None:
    options = MLP(depth=2, width=5)
    network = options.build((1, 2, 2), 3).eval()
    inputs = torch.randn(4, 1, 2, 2)
    kept = compact(network, inputs).network if compacted else network
    torch.save(store(kept, options, (1, 2, 2), 3), tmp_path / "network.pt")
    restored = restore(torch.load(tmp_path / "network.pt", weights_only=True))
    assert torch.equal(restored(inputs), kept(inputs))
    assert not restored.training


def test_what_cannot_be_kept_is_found_before_training() -> None:
    check_storable(MLP().build((4,), 2), torch.randn(3, 4))
    with pytest.raises(UserError, match=r"Moody\.forward cannot be traced.*set compaction\.enabled: false"):
        check_storable(Moody(), torch.ones(1, 2))
    with pytest.raises(UserError, match=r"cannot store a Softmax.*set compaction\.enabled: false"):
        check_storable(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), torch.ones(1, 2))


def test_options_of_modules_come_back() -> None:
    sample = torch.randn(2, 1, 4, 4)
    for module in (nn.AvgPool2d(2, divisor_override=1), nn.LayerNorm(4, bias=False)):
        check_storable(nn.Sequential(module, nn.ReLU()), sample)
