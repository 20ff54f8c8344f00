"""Networks of several inputs and outputs, as users write them."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.inputs import Call, Several
from slimfront.trainables.models.adapted import adapted

Named = namedtuple("Named", ["logits", "hidden"])


@dataclass
class Outputs:
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    """Gives its outputs in a form."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(3, 2), form

    def forward(self, first: Tensor, second: Tensor | None = None, factor: float = 2.0) -> Any:
        x = self.layer(first) * factor
        x = x if second is None else x + second
        forms = {
            "plain": x,
            "mapping": {"logits": x, "hidden": first},
            "tuple": (first, x),
            "list": [first, x],
            "named": Named(x, first),
            "dataclass": Outputs(x, first),
        }
        return forms[self.form]


class Keywords(Net):
    def forward(self, first: Tensor, **others: Tensor) -> Any:  # type: ignore[override]
        return super().forward(first, others["second"])


class Strict(Net):
    def forward(self, first: Tensor, *, second: Tensor, third: Tensor) -> Any:  # type: ignore[override]
        return super().forward(first, second + third)


FIRST, SECOND = torch.arange(6.0).reshape(2, 3), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (("first", "second"), True),
        (("second", "first"), True),
        (("first",), False),
        (("0", "1"), True),
    ],
)
def test_inputs_go_to_arguments_by_name_or_place_and_the_others_keep_their_defaults(
    names: tuple[str, ...], both: bool
) -> None:
    network = Net()
    wanted = network(FIRST, SECOND if both else None)
    values = {"first": FIRST, "second": SECOND, "0": FIRST, "1": SECOND}
    taken = adapted(network, Call(names))
    assert taken is network and isinstance(taken, Net)
    assert list(taken.state_dict()) == ["layer.weight", "layer.bias"]
    assert torch.equal(taken(Several({name: values[name] for name in names})), wanted)


def test_a_network_that_takes_any_name_is_given_them_all() -> None:
    network = adapted(Keywords(), Call(("first", "second")))
    plain = network.layer(FIRST) * 2 + SECOND
    assert torch.equal(network(Several({"first": FIRST, "second": SECOND})), plain)


@pytest.mark.parametrize(
    ("network", "names", "message"),
    [
        (Net(), ("first", "secnd"), "the input 'secnd', .* did you mean 'second'"),
        (Net(), ("second",), r"Net.forward needs 'first', and the data has only second"),
        (Strict(), ("first", "second"), "Strict.forward needs 'third'"),
        (Net(), ("0", "1", "2", "3"), "4 inputs, and Net.forward takes 3 by their places"),
        (Strict(), ("0", "1"), "2 inputs, and Strict.forward takes 1 by their places"),
        (Strict(), ("0",), "Strict.forward needs 'second'"),
    ],
)
def test_inputs_that_forward_does_not_take_are_refused(
    network: nn.Module, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        adapted(network, Call(names))


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("mapping", "logits"),
        ("tuple", 1),
        ("tuple", -1),
        ("list", 1),
        ("named", "logits"),
        ("named", 0),
        ("dataclass", "logits"),
    ],
)
def test_the_output_that_counts_is_taken_from_whatever_forward_returns(
    form: str, output: str | int
) -> None:
    network = Net(form)
    wanted = network.layer(FIRST) * 2
    assert torch.equal(adapted(network, Call(None, output))(FIRST), wanted)


def test_a_forward_that_was_set_on_this_network_alone_is_the_one() -> None:
    network = Net("tuple")
    wanted = network(FIRST)[1]
    of_class = network.forward
    network.forward = lambda x: of_class(x + 1)  # type: ignore[method-assign]
    torch.testing.assert_close(adapted(network, Call(None, 1))(FIRST - 1), wanted)


@pytest.mark.parametrize(
    ("form", "output", "message"),
    [
        ("mapping", "logit", r"task.output is 'logit', and the network returns \['logits', 'hid"),
        ("tuple", 2, "task.output is 2, and the network returns tuple"),
        ("tuple", "logits", "task.output is 'logits', and the network returns tuple"),
        ("dataclass", "logit", "and the network returns Outputs, which has none such"),
        ("plain", "logits", "and the network returns one tensor"),
        ("plain", 0, "and the network returns one tensor; leave task.output out"),
    ],
)
def test_an_output_that_is_not_there_is_refused(form: str, output: str | int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(Net(form), Call(None, output))(FIRST)
