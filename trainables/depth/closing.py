"""Whole layers that go while a network is trained: chosen when a third of the training is over,
closed little by little, and gone for the rest of it.

A layer closes by a gate at its end, x + open · (f(x) − x) with x its input, and f(x) what it gives:
`open` falls from 1 to 0. So the layers around it learn to do without it while learning rates are
high. Of a run of layers that are to be one, the activations close (a continuous form of what
DepthShrinker does at once, Fu et al. 2022, arXiv 2206.00843), and its padding moves in front when
they are chosen; the layers stay apart in training, with their batch norms, and compaction makes one
of them, exactly.
"""

import copy
import operator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimfront.trainables.compaction.modes import traced_in_both_modes
from slimfront.trainables.compaction.options import Compaction
from slimfront.trainables.compaction.report import Step
from slimfront.trainables.compaction.whole_layers import make_apart, take_out
from slimfront.trainables.data import Dataset
from slimfront.trainables.depth.base import ends
from slimfront.trainables.depth.options import Depth
from slimfront.trainables.depth.removal import Agree, found_again, worth_least
from slimfront.trainables.depth.shallower import asked_for, judged_on
from slimfront.trainables.measures.latency import Latency

CHOSEN = 1 / 3
"""The share of the epochs after which layers are chosen."""
CLOSED = 0.55
"""The share of the epochs after which they are closed."""
LEAST_EPOCHS = 3
"""One before layers are chosen, one in which they close, and one without them."""

_OPEN = "depth_open"
"""How far the gates are open, as the view calls it."""


_State = Literal["whole", "closing", "closed"]


class _End(NamedTuple):
    """The names of the node that is passed on, and of that whose place it takes."""

    passed: str
    made: str


def prepared(network: nn.Module, sample: Tensor) -> GraphModule:
    """The network as `Closing` takes it: traced, its attention in linear layers. Raises UserError
    if it cannot be.

    Args:
        sample: (N, *input_shape), what it sees.
    """
    graph = traced_in_both_modes(network, sample)
    make_apart(graph)
    return graph


class Closing:
    """What closes in one network; its state can be saved after each epoch.

    `view` is the network as it is trained now. It has the modules and parameters of the whole
    network, in which nothing changes but where padding stands.
    """

    def __init__(
        self,
        network: GraphModule,
        data: Dataset,
        options: Depth,
        latency: Latency | None = None,
        *,
        epochs: int,
        steps_per_epoch: int,
        compaction: Compaction | None = None,
        agree: Agree | None = None,
    ) -> None:
        """
        Args:
            network: as `prepared` gives it, on the device of `data`.
            latency: how times are taken, where they are to be reached.
            epochs: those of the training, at least `LEAST_EPOCHS`.
            compaction: how the network will be made compact.
            agree: as in `Asked`.
        """
        self.network = network
        self.data = data
        self.asked = asked_for(options, latency, at_most=True, compaction=compaction, agree=agree)
        self.first = max(1, round(CHOSEN * epochs))
        self.last = max(self.first + 1, round(CLOSED * epochs))
        self.steps_per_epoch = steps_per_epoch
        self.chosen = False
        self.gone: list[Step] = []
        """What was chosen, as a report tells it."""
        self.state: _State = "whole"
        self.view = network
        self._ends: list[_End] = []
        self._open = torch.ones((), device=data.device)

    def begin(self, epoch: int) -> bool:
        """Called before an epoch (from 0): chooses, and makes another view, where it is time to.
        Whether there is another view.

        Raises:
            UserError: as `worth_least`.
        """
        if epoch < self.first:
            return False
        if not self.chosen:
            self._choose()
        state: _State = "closing" if epoch < self.last else "closed"
        if state == self.state:
            return False
        self._turn(state)
        return True

    def at(self, step: int) -> None:
        """Called before a training step (from 0): opens the gates as far as they are then."""
        began = self.first * self.steps_per_epoch
        whole = (self.last - self.first) * self.steps_per_epoch
        share = 1 - (step + 1 - began) / whole
        self._open.fill_(min(max(share, 0.0), 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Plain data: what was chosen, and where padding stands now."""
        padding = {}
        for name, module in self.network.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                padding[name] = module.padding
        return {
            "chosen": self.chosen,
            "gone": [tuple(step) for step in self.gone],
            "ends": [tuple(end) for end in self._ends],
            "padding": padding,
        }

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Continues where `state_dict` was taken, after so many epochs and steps."""
        self.gone = [tuple(step) for step in state["gone"]]
        self._ends = [_End(*end) for end in state["ends"]]
        for name, padding in state["padding"].items():
            self.network.get_submodule(name).padding = padding
        self.chosen = state["chosen"]
        if not self.chosen:
            return
        self._turn("closed" if epoch > self.last else "closing")
        self.at(step - 1)

    def _turn(self, state: _State) -> None:
        self.state = state
        if state == "closed":
            self.view = self._closed()
        else:
            self.view = self._gated()

    def _choose(self) -> None:
        """Chooses the layers, and moves the padding of those that are to be one."""
        self.chosen = True
        whole = _sharing(self.network).eval()
        batches = judged_on(self.data)
        loss = self.data.task.loss
        self.gone = worth_least(whole, batches, self.asked, loss, merging=False)
        sample = batches[0].inputs[:3]
        for layer in found_again(whole, sample, self.gone):
            for passed, made in ends(layer):
                self._ends.append(_End(passed.name, made.name))
            take_out(whole, layer, merging=False)

    def _gated(self) -> GraphModule:
        """The network with a gate at each end of what was chosen."""
        view = _sharing(self.network)
        view.register_buffer(_OPEN, self._open)
        nodes = {node.name: node for node in view.graph.nodes}
        for end in self._ends:
            passed = nodes[end.passed]
            made = nodes[end.made]
            with view.graph.inserting_after(made):
                share = view.graph.get_attr(_OPEN)
            with view.graph.inserting_after(share):
                change = view.graph.call_function(operator.sub, (made, passed))
            with view.graph.inserting_after(change):
                part = view.graph.call_function(operator.mul, (change, share))
            with view.graph.inserting_after(part):
                gated = view.graph.call_function(operator.add, (passed, part))
            made.replace_all_uses_with(gated, lambda user, change=change: user is not change)
        return _checked(view)

    def _closed(self) -> GraphModule:
        """The network without what was chosen."""
        view = _sharing(self.network)
        nodes = {node.name: node for node in view.graph.nodes}
        for end in self._ends:
            nodes[end.made].replace_all_uses_with(nodes[end.passed])
        view.graph.eliminate_dead_code()
        view.delete_all_unused_submodules()
        return _checked(view)


def _sharing(network: GraphModule) -> GraphModule:
    """Another graph over the same modules and parameters."""
    return GraphModule(network, copy.deepcopy(network.graph))


def _checked(view: GraphModule) -> GraphModule:
    view.graph.lint()
    view.recompile()
    return view
