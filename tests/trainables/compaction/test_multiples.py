"""Numbers of units stay at multiples, none above the dense network's, with equal outputs."""

import logging

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from slimfront import Candidate, train
from slimfront.trainables.compaction import Compacted, Compaction, compact, coupled
from slimfront.trainables.structure.attention_modules import Attention
from slimfront.trainables.structure.channel_groups import channel_groups
from slimfront.trainables.structure.coupling.units import put_back
from slimfront.trainables.structure.graph import WeightLayer
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.training.rehearsal import rehearse
from tests.marks import often
from tests.trainables.networks import Mixed, Transformer, damage_batch_norms

ROWS = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DIGITS = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def smaller(model: nn.Module, inputs: Tensor, multiple: int) -> Compacted:
    """The network made compact, which computes what it did."""
    made = compact(model, inputs, Compaction(multiple=multiple, merge="never"))
    with torch.no_grad():
        wanted = model(inputs)
        assert float((made.network(inputs) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    return made


def widths(network: nn.Module) -> dict[str, int]:
    """How many units each layer has."""
    return {
        name: len(layer.weight)
        for name, layer in network.named_modules()
        if isinstance(layer, WeightLayer)
    }


def perceptron(width: int, *dead: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3)).eval()
    with torch.no_grad():
        model[0].weight[list(dead)] = 0  # their biases, which stay, move on
    return model


def test_the_first_that_go_stay() -> None:
    gone = torch.tensor([True, False, True, True, False, True, True, True])
    assert put_back(gone, 1).tolist() == [False] * 8
    assert put_back(gone, 4).tolist() == [True, False, True, *[False] * 5]
    assert put_back(gone, 3).tolist() == [True, *[False] * 7]
    assert torch.equal(put_back(gone, 16), gone)


@pytest.mark.parametrize(
    ("width", "dead", "multiple", "left"),
    [
        (32, 13, 1, 19),
        (32, 13, 8, 24),
        (32, 16, 8, 16),
        (32, 31, 8, 8),
        (32, 3, 8, 32),
        (30, 3, 8, 30),
        (30, 7, 8, 24),
        (6, 2, 8, 6),
    ],
)
def test_units_of_a_perceptron_stay_at_a_multiple(
    width: int, dead: int, multiple: int, left: int
) -> None:
    model = perceptron(width, *range(dead))
    made = smaller(model, ROWS, multiple)
    assert widths(made.network) == {"0": left, "2": 3}
    fewest = smaller(model, ROWS, 1)
    if left < width:
        # What was put back is zero: it costs no non-zero parameter.
        assert made.measures["nonzero_params"] == fewest.measures["nonzero_params"]


def test_a_layer_without_a_unit_goes_as_a_whole_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    assert widths(smaller(model, ROWS, 8).network) == {"2": 3}


def test_a_bottleneck_without_a_unit_keeps_a_multiple() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 50)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    made = smaller(model, ROWS, 4)
    assert widths(made.network) == {"0": 4, "2": 50}
    assert made.measures["nonzero_params"] == 50


def kill(model: nn.Module, inputs: Tensor, share: float, seed: int) -> None:
    """Zeroes units of every group, drawn at random."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in channel_groups(trace(model), inputs):
            dead = torch.rand(group.units, generator=generator) < share
            for name, owners in group.writers.items():
                parameters[name][dead[owners.clamp(min=0)] & (owners >= 0)] = 0


@pytest.mark.parametrize("by_dependencies", [False, True])
@pytest.mark.parametrize("multiple", often([4, 8], 8))
def test_channels_that_are_coupled_stay_at_multiples_in_every_layer(
    multiple: int,
    by_dependencies: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By our own analysis, and by Torch-Pruning's graph, which is asked where that is at its
    end. A unit is two channels of some layers here and four of others."""
    if by_dependencies:
        monkeypatch.setattr(coupled, "sliced", lambda *_: None)
    put_back_somewhere = False
    for seed in range(6):
        torch.manual_seed(seed)
        model = Mixed().eval()
        damage_batch_norms(model)
        kill(model, IMAGES, 0.6, seed)
        fewest = widths(smaller(model, IMAGES, 1).network)
        made = widths(smaller(model, IMAGES, multiple).network)
        least = {name: -(-count // multiple) * multiple for name, count in fewest.items()}
        least["depthwise"] = least["stem"] + least["side"]
        least["head"] = 5  # which gives the outputs
        assert made == least, seed
        put_back_somewhere |= made != fewest
    assert put_back_somewhere
    # Torch-Pruning finds fewer groups in what is left of one of them.
    assert by_dependencies or "units without a weight stay" not in caplog.text


def test_a_flattened_convolution_keeps_a_multiple_of_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 9, 4)
    ).eval()
    with torch.no_grad():
        model[0].weight[:7] = 0
    made = smaller(model, IMAGES, 4)
    assert widths(made.network) == {"0": 12, "4": 4}
    assert tuple(made.network.get_submodule("4").weight.shape) == (4, 12 * 9)  # type: ignore[arg-type]


@pytest.mark.parametrize(("multiple", "left"), [(1, 3), (4, 3), (8, 4), (16, 4)])
def test_heads_stay_until_their_width_is_a_multiple(multiple: int, left: int) -> None:
    torch.manual_seed(0)
    model = Transformer().eval()  # four heads of four
    attention: nn.MultiheadAttention = model.blocks[0].attention  # type: ignore[assignment]
    with torch.no_grad():
        attention.in_proj_weight[36:40] = 0
    network = smaller(model, DIGITS, multiple).network
    heads = [module.heads for module in network.modules() if isinstance(module, Attention)]
    assert heads == [left, 4]


def test_what_stays_for_a_multiple_is_a_step_and_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(perceptron(32, *range(13)), nn.Sigmoid(), nn.Linear(3, 2)).eval()
    made = smaller(model, ROWS, 8)
    assert ("0.0", "zeros stay", "5 units without a weight, for a multiple of 8") in (
        made.report.steps
    )
    assert "units without a weight stay" not in caplog.text


def test_what_stays_though_no_multiple_needs_it_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Softmax(1), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[0].weight[:13] = 0
        model[0].bias[:13] = 0
    smaller(model, ROWS, 8)
    assert "units without a weight stay" in caplog.text
    assert "13 of '0'" in caplog.text


def test_a_multiple_without_compaction_is_refused() -> None:
    with pytest.raises(ValidationError, match="is kept by compaction, which is not enabled"):
        Compaction(enabled=False, multiple=8)


def candidate() -> Candidate:
    return Candidate.model_validate(
        {
            "model": {"name": "mlp", "depth": 2, "width": 32},
            "training": {"epochs": 2, "lr": 0.01, "seed": 0},
            "penalties": {"node": {"strength": 3e-2}},
            "compaction": {"multiple": 8, "merge": "never"},
        }
    )


def test_every_network_of_a_candidate_has_multiples_and_the_rehearsal_warns_of_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        rehearse(candidate())
    assert "compaction cannot remove" not in caplog.text
    done = train(candidate())
    networks = [one.compacted.network for one in (done, *done.pruned)]
    hidden = [width for network in networks for width in list(widths(network).values())[:-1]]
    assert all(width % 8 == 0 for width in hidden)
    assert min(hidden) < 32
