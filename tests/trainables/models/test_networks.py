import pytest
import torch
from pydantic import ValidationError
from torch import nn

from slimfront.trainables.measures.measure import measure
from slimfront.trainables.models import MODELS, VGG, CifarResNet, LeNet, ResNet18


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"resnet110", "factory"}))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_every_network_takes_grey_and_colour_images(name: str, shape: tuple[int, ...]) -> None:
    network = MODELS[name](name=name).build(shape, outputs=7)
    assert network(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)]
)
def test_cifar_resnets_have_the_sizes_of_the_paper(name: str, millions: float) -> None:
    network = MODELS[name](name=name).build((3, 32, 32), outputs=10)
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    # Table 6 of arXiv 1512.03385; projections add 0.003.
    assert parameters == pytest.approx(millions, abs=0.01)
    convolutions = [
        m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet"))


def test_resnet18_has_the_size_of_the_paper_and_a_small_stem_for_small_images() -> None:
    large = ResNet18().build((3, 224, 224), outputs=1000)
    assert sum(p.numel() for p in large.parameters()) == 11_689_512
    assert large[0].kernel_size == (7, 7)
    assert large(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert ResNet18().build((3, 32, 32), outputs=10)[0].kernel_size == (3, 3)


def test_vgg16_has_thirteen_convolutions() -> None:
    layers = measure(VGG(width=2).build((3, 32, 32), 10), torch.zeros(1, 3, 32, 32))["layers"]
    assert layers == 14


def test_lenet_has_the_units_of_the_original_times_the_width() -> None:
    network = LeNet(width=0.5, depth=3).build((1, 28, 28), 10)
    assert [m.weight.shape[0] for m in network if isinstance(m, nn.Conv2d | nn.Linear)] == [
        3,
        8,
        60,
        42,
        42,
        10,
    ]


def test_depth_and_width_override_the_name() -> None:
    network = CifarResNet(name="resnet20", depth=8, width=4).build((3, 32, 32), 10)
    assert measure(network, torch.zeros(1, 3, 32, 32))["layers"] == 8 + 2
    with pytest.raises(ValidationError, match="6n \\+ 2, such as 20 or 26, and it is 9"):
        CifarResNet(depth=9)
