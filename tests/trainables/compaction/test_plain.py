import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.compaction import compact, deserialise, serialise
from slimfront.trainables.compaction.plain.modules import module_from_plain, module_to_plain
from slimfront.trainables.models.resnet import BasicBlock
from slimfront.trainables.structure import operations


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 3),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Identity(),
        nn.Linear(3, 2, bias=False),
    ).eval()


def test_a_stored_network_loads_with_weights_only_in_another_process(tmp_path: Path) -> None:
    model = network()
    inputs = torch.randn(5, 4)
    torch.save(serialise(fx.symbolic_trace(model)), tmp_path / "network.pt")
    torch.save({"inputs": inputs, "outputs": model(inputs)}, tmp_path / "expected.pt")
    program = f"""
import torch
from pathlib import Path
from slimfront.trainables.compaction import deserialise
folder = Path({str(tmp_path)!r})
network = deserialise(torch.load(folder / "network.pt", weights_only=True))
expected = torch.load(folder / "expected.pt", weights_only=True)
assert torch.equal(network(expected["inputs"]), expected["outputs"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


class Odd(nn.Module):
    """A module and an operation that are none of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class WithLeaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Odd) or super().is_leaf_module(m, module_qualified_name)


def test_an_unknown_kind_of_module_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Odd())
    traced = fx.GraphModule(model, WithLeaf().trace(model))
    with pytest.raises(ValueError, match=r"cannot store a Odd \('1'\)"):
        serialise(traced)


def test_an_unknown_operation_is_named() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    node = next(node for node in traced.graph.nodes if node.op == "call_module")
    with traced.graph.inserting_after(node):
        odd = traced.graph.call_function(subprocess.run, (node,))
    node.replace_all_uses_with(odd, lambda user: user is not odd)
    with pytest.raises(ValueError, match="cannot store the operation 'run'"):
        serialise(traced)


@pytest.mark.parametrize("name", sorted(operations._kinds()))
def test_every_kind_of_module_that_is_made_of_numbers_comes_back(name: str) -> None:
    kind = operations.kind_of(name)
    assert kind is not None
    try:
        module = kind(**SETTINGS.get(name, {}))
    except TypeError:
        module = kind(*[2] * len(needed(kind)))
    module.eval()
    plain = module_to_plain(module, "one")
    again = module_from_plain(plain, {})
    assert type(again) is kind
    assert again.extra_repr() == module.extra_repr()
    wanted = module.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in again.state_dict().items())


def needed(kind: type[nn.Module]) -> list[str]:
    """The arguments that a kind of module cannot be made without."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind == 1 and p.name != "self"]


SETTINGS: dict[str, dict[str, Any]] = {
    "conv2d": {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 1), "groups": 2},
    "convtranspose2d": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "bias": False},
    "lstm": {"input_size": 3, "hidden_size": 4, "num_layers": 2, "proj_size": 2},
    "gru": {"input_size": 3, "hidden_size": 4, "bidirectional": True, "bias": False},
    "rnn": {"input_size": 3, "hidden_size": 4, "nonlinearity": "relu"},
    "layernorm": {"normalized_shape": (3, 4), "bias": False},
    "multiheadattention": {"embed_dim": 8, "num_heads": 2, "kdim": 4, "add_bias_kv": True},
    "countinggroupnorm": {"sizes": (2, 3), "total": 4, "eps": 1e-5},
    "attention": {"heads": 3, "dropout": 0.1},
    "unflatten": {"dim": 1, "unflattened_size": (2, 2)},
    "fractionalmaxpool2d": {"kernel_size": 2, "output_size": 3},
    "fractionalmaxpool3d": {"kernel_size": 2, "output_size": 3},
    "upsample": {"scale_factor": 2, "mode": "bilinear", "align_corners": False},
}


@pytest.mark.parametrize(
    "name",
    [
        *("torch.load", "torch.save", "torch.hub.load", "torch.from_file", "torch.compile"),
        *("aten.from_file.default", "aten.from_file.out", "aten.save.default", "torch.classes"),
        *("os.system", "subprocess.run", "importlib.import_module", "eval", "exec", "__import__"),
        *("torch.ops.load_library", "handle_torch_function", "torch.nn.Module", "math.sqrt.x"),
        *("torch.jit.load", "torch.serialization.load", "warnings.warn", "", None, 3),
    ],
)
def test_names_of_what_does_not_compute_are_no_operations(name: object) -> None:
    assert operations.function_of(name) is None
    assert name not in operations.methods()


def test_all_operations_are_torch_s_or_of_numbers() -> None:
    for name in operations._functions():
        function = operations.function_of(name)
        module = getattr(function, "__module__", None) or "torch"
        assert module.partition(".")[0] in ("torch", "_operator", "math"), name
        assert operations.function_of(operations.name_of(function)) is function


def test_a_network_with_branches_and_nested_modules_comes_back_bit_identical() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), BasicBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(deserialise(serialise(fx.symbolic_trace(model)))(inputs), model(inputs))


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="stored in format 99, and this version reads format"):
        deserialise({"format": 99})


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: F.pad(x, (1, 1, 0, 2)),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: torch.cat([x, torch.stack([x, x], 1).sum(1)], 1),
        lambda x: torch.split(x, 2, 1)[0] * x.split([2, 2], dim=1)[1],
        lambda x: torch.chunk(x, 2, dim=1)[1] / 3 - x.chunk(2, 1)[0],
        lambda x: torch.einsum("nchw,nchv->nwv", x, x),
        lambda x: F.silu(x).softmax(1) + F.log_softmax(x, dim=-1) @ torch.sigmoid(x),
        lambda x: F.pixel_shuffle(F.leaky_relu(x, 0.2), 2).clamp(min=0),
        lambda x: x.repeat(1, 2, 1, 1).unflatten(1, (2, -1)).amax(1).roll(1, 2) ** 2,
        lambda x: F.normalize(F.max_pool1d(x.flatten(2), 2), dim=1),
    ],
)
def test_common_operations_come_back_bit_identical(operation: Callable[[Tensor], Tensor]) -> None:
    class Does(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operation(x)

    inputs = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    restored = deserialise(serialise(fx.symbolic_trace(Does())))
    assert torch.equal(restored(inputs), operation(inputs))


class Table(nn.Module):
    """Rows of a buffer, which are chosen by the inputs."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", torch.randn(10, 8))
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[x] - self.table[0] * 2
        made: Tensor = self.last(self.first(rows).relu())
        return made


def test_a_table_that_is_no_parameter_comes_back() -> None:
    inputs = torch.randint(0, 10, (8,))
    network = compact(Table().eval(), inputs).network
    assert torch.equal(deserialise(serialise(network))(inputs), network(inputs))
