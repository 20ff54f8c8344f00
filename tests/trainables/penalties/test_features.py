import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.models import CifarResNet, LeNet
from slimfront.trainables.penalties.aug_cka import AugCKA
from slimfront.trainables.penalties.cka import CKA
from slimfront.trainables.penalties.features import by_shape, find_layers, output_shapes


def stages_of(model: nn.Module, sample: Tensor) -> list[list[str]]:
    shapes = output_shapes(model, sample)
    return by_shape(find_layers(model, shapes), shapes)


def test_of_a_plain_network_the_activations_of_equal_shape_are_a_stage() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 3),
        nn.ReLU(),
        nn.Linear(3, 8),
        nn.ReLU(),
    )
    assert stages_of(model, torch.zeros(2, 4)) == [["1", "3", "7"]]
    assert find_layers(model, output_shapes(model, torch.zeros(2, 4))) == ["1", "3", "5", "7"]


def test_of_a_residual_network_the_outputs_of_the_blocks_are_the_stages() -> None:
    model = CifarResNet().build((3, 32, 32), 10)
    stages = stages_of(model, torch.zeros(2, 3, 32, 32))
    assert [len(stage) for stage in stages] == [3, 3, 3]
    assert {type(model.get_submodule(name)).__name__ for stage in stages for name in stage} == {
        "BasicBlock"
    }


def test_blocks_within_blocks_count_once_and_containers_do_not_count() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(Inner(), Inner())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.parts(x)
            return out

    model = nn.Sequential(
        nn.Sequential(Outer(), Outer()), nn.Sequential(Outer(), Outer()), nn.Linear(4, 2)
    )
    assert stages_of(model, torch.zeros(2, 4)) == [["0.0", "0.1", "1.0", "1.1"]]


def test_of_a_network_without_activation_modules_the_weight_layers_are_compared() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.relu(self.a(x)))
            return out

    assert stages_of(Functional(), torch.zeros(2, 4)) == [["a", "b"]]


def test_a_module_that_is_called_twice_is_left_out() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), nn.ReLU())
    assert "1" not in output_shapes(model, torch.zeros(2, 4))
    assert "5" in output_shapes(model, torch.zeros(2, 4))


def test_looking_at_shapes_leaves_the_network_as_it_was() -> None:
    model = CifarResNet().build((3, 32, 32), 10)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    output_shapes(model, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


def test_layers_and_stages_can_be_named() -> None:
    batch = torch.randn(16, 4)
    assert CKA(strength=1.0, stages=(("1", "3"),)).attach(plain(), batch).stages == [["1", "3"]]
    assert AugCKA(strength=1.0, layers=("0", "6")).attach(plain(), batch).stages == [["0", "6"]]
    with pytest.raises(
        UserError, match=r"'relu' is not a module that gives one tensor once .*; known: 0, 1, 2"
    ):
        AugCKA(strength=1.0, layers=("relu", "1")).attach(plain(), batch)
    for wrong in ((("1",),), (), (("1", "1"),)):
        with pytest.raises(ValueError, match="two or more different layers"):
            CKA(strength=1.0, stages=wrong)
    with pytest.raises(ValueError, match="two or more different layers"):
        AugCKA(strength=1.0, layers=("1", "1"))


def test_a_pair_weight_for_layers_that_are_not_compared_is_refused() -> None:
    for pair in ({"1": {"6": 2.0}}, {"1": {"1": 2.0}}):
        with pytest.raises(UserError, match="are not a pair that is compared"):
            CKA(strength=1.0, pair_weights=pair).attach(plain(), torch.randn(16, 4))


def test_a_network_whose_layers_all_differ_in_shape_has_no_stage_but_augcka_acts_on_it() -> None:
    model, sample = LeNet().build((1, 28, 28), 10), torch.randn(8, 1, 28, 28)
    assert CKA(strength=1.0).attach(model, sample).targets == 0
    assert AugCKA(strength=1.0).attach(model, sample).targets == 1


@pytest.mark.parametrize(
    "penalty", [CKA(strength=1.0, every=1, samples=-1), AugCKA(strength=1.0, every=1, samples=-1)]
)
def test_under_autocast_the_value_is_that_of_float32_features(penalty: CKA | AugCKA) -> None:
    model, batch = plain(), torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    active = penalty.attach(model, batch)
    active.before_batch(0, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch)
        kept = [[active.features.kept[name].clone() for name in stage] for stage in active.stages]
        loss = active.loss()
    assert kept[0][0].dtype == torch.bfloat16
    assert loss is not None
    assert loss.dtype == torch.float32
    exact = penalty.value([[x.double() for x in stage] for stage in kept], active.weights)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    active.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert not active.features.kept


def test_a_network_that_changes_its_activations_in_place_trains_under_it() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.ReLU(inplace=True),
    )
    batch = torch.randn(8, 4)
    for penalty in (CKA(strength=1.0, every=1), AugCKA(strength=1.0, every=1, layers=("1", "3"))):
        active = penalty.attach(model, batch)
        active.before_batch(0, 1.0)
        output = model(batch)
        loss = active.loss()
        assert loss is not None
        (output.sum() + loss).backward()
        active.close()
