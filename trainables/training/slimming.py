"""Slimming: penalties and a sparsifier at work on one network and its optimiser, in any training
loop.

A training step is the same everywhere, in a loop of the user's and in ours: the penalties' loss is
added before the backward pass; gradients of dropped weights are zeroed before the optimiser's step;
after it come the proximal steps of the penalties, and then the masks.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Annotated, Any, Self

import torch
import torch.distributed as dist
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from slimfront.trainables.compaction import Compacted, Compaction, compact
from slimfront.trainables.data import Split
from slimfront.trainables.errors import UserError, first_few
from slimfront.trainables.inputs import Several, as_one, each
from slimfront.trainables.models.adapted import as_called_with, in_order_of_forward
from slimfront.trainables.options import Options, validated
from slimfront.trainables.penalties import PENALTIES, ActivePenalty, Penalty
from slimfront.trainables.penalties.base import ActiveGroups, GroupPenalty, StepSizes
from slimfront.trainables.penalties.cka import ActiveFeatures
from slimfront.trainables.penalties.features import remove_hooks
from slimfront.trainables.penalties.relative import absolute
from slimfront.trainables.shipping.shipped import ByArguments
from slimfront.trainables.sparsifiers import SPARSIFIERS, ActiveSparsifier, Setting, Sparsifier
from slimfront.trainables.sparsifiers.base import out_of_reach
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.trace import traced_once
from slimfront.trainables.training.optimizers import check_optimizer, step_sizes

Loss = Callable[[Any, Any], Tensor]
Examples = Callable[[int], Split]
"""Gives so many examples."""

log = logging.getLogger(__name__)


class Asked(Options):
    """What is to act on a network: penalties by name, and a sparsifier, as in a config."""

    penalties: Annotated[
        dict[str, SerializeAsAny[Penalty]], BeforeValidator(PENALTIES.parse_mapping)
    ] = Field(default_factory=dict)
    sparsifier: (
        SerializeAsAny[Annotated[Sparsifier, BeforeValidator(SPARSIFIERS.parse_named)]] | None
    ) = None


class Acting:
    """The penalties and the sparsifier of one network, which count no steps themselves: what all
    training loops share."""

    def __init__(
        self, asked: Asked, network: nn.Module, sample: Tensor, setting: Setting | None
    ) -> None:
        """`network` takes `sample` (N, …) as its one argument; without a `setting` there is no
        sparsifier.

        Raises:
            UserError: if what is asked for has nothing to act on, or cannot be done.
        """
        self.penalty_options = [options for options in asked.penalties.values() if options.on]
        self.penalties: list[ActivePenalty] = []
        self.sparsifier: ActiveSparsifier | None = None
        sparsifier = asked.sparsifier
        try:
            with traced_once():
                for options in self.penalty_options:
                    active = options.attach(network, sample)
                    self.penalties.append(active)
            if setting is not None and sparsifier is not None and sparsifier.on:
                self.sparsifier = sparsifier.attach(setting)
        except BaseException:
            self.close()
            raise

    def watch(self, step: int, epoch: float) -> None:
        """Tells the penalties which step comes: called before its forward pass."""
        pairs = zip(self.penalties, self.penalty_options, strict=True)
        for penalty, options in pairs:
            scale = options.scale(epoch)
            penalty.before_batch(step, scale)

    def losses(self) -> list[Tensor]:
        """What the penalties add to the loss after a forward pass, a scalar each."""
        found = []
        for penalty in self.penalties:
            value = penalty.loss()
            if value is not None:
                found.append(value)
        return found

    def before_step(self, step: int) -> None:
        """Between the backward pass and the optimiser's step."""
        if self.sparsifier is not None:
            self.sparsifier.before_step(step)

    def after_step(self, step: int, sizes: StepSizes) -> None:
        """After the optimiser's step: proximal steps, then masks."""
        for penalty in self.penalties:
            if isinstance(penalty, ActiveGroups):
                penalty.proximal_of_each(sizes)
            else:
                penalty.proximal(sizes.largest)
        if self.sparsifier is not None:
            self.sparsifier.after_step(step)

    def close(self) -> None:
        """Takes the penalties' hooks off the network."""
        for penalty in self.penalties:
            penalty.close()


class _Rise:
    """How far the learning rate rises above what it was when strengths were made relative to it, as
    in a warm-up: they act so many times as strongly then."""

    def __init__(self, optimizer: torch.optim.Optimizer, penalties: Mapping[str, Penalty]) -> None:
        self.optimizer = optimizer
        self.names = []
        for name, options in penalties.items():
            if isinstance(options, GroupPenalty) and options.relative and options.on:
                self.names.append(f"'{name}'")
        self.first = self._highest()

    def _highest(self) -> float:
        """The highest learning rate of those that are plain numbers; of those that a schedule
        begins with where all are 0, as in a warm-up."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if not any(rates):
            rates = [group.get("initial_lr", 0.0) for group in groups]
        return max((float(rate) for rate in rates if not isinstance(rate, Tensor)), default=0.0)

    def say_if_far(self) -> None:
        """Warns, once, where the learning rate is more than twice what it was."""
        if not self.names:
            return
        now = self._highest()
        if now <= 2 * self.first:
            return
        log.warning(
            "the learning rate has risen from %g to %g since Slimming was made, and the strength "
            "of %s is relative to steps as long as they were then, so that it acts up to %.3g "
            "times as strongly; make Slimming while the optimizer has the mean learning rate of "
            "the training, or give strengths that are not relative",
            self.first,
            now,
            " and ".join(self.names),
            now / self.first if self.first else float("inf"),
        )
        self.names = []


class Slimming(AbstractContextManager["Slimming"]):
    """Penalties and a sparsifier in a training loop of the user's.

    ```python
    slim = Slimming(network, optimizer, inputs, steps=total_steps,
                    penalties={"layer": {"strength": 2.0}},
                    sparsifier={"name": "channels", "sparsity": 0.5})
    for batch in loader:
        loss = criterion(network(batch.x), batch.y) + slim.loss()
        optimizer.zero_grad()
        loss.backward()
        slim.before_step()
        optimizer.step()
        slim.after_step()
    small = slim.compact(inputs)
    ```

    Learning rates are read from the optimiser's parameter groups in each step, so schedules need
    nothing; the proximal step of a group of weights has the learning rate of its largest parameter.
    With gradient accumulation, add `loss()` to the loss of each part. With a `GradScaler`, call
    `scaler.unscale_(optimizer)` before `before_step`. Penalties leave alone what is not trained; a
    sparsifier acts on it too, unless it is excluded.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Any,
        *,
        steps: int,
        penalties: Mapping[str, Any] | None = None,
        sparsifier: Mapping[str, Any] | Sparsifier | str | None = None,
        steps_per_epoch: int | None = None,
        targets: Tensor | None = None,
        loss: Loss | None = None,
        output: str | int | None = None,
        seed: int = 0,
        trained: bool = False,
    ) -> None:
        """
        Args:
            network: wrapped by DistributedDataParallel or torch.compile or not; on its device.
            optimizer: any of torch's but LBFGS, with the parameters of `network`.
            inputs: a batch of real inputs, as the network is called: a tensor (N, …), a tuple of
                tensors, or a mapping of tensors by the names of forward's arguments.
            steps: how many optimiser steps the whole training has; schedules of sparsifiers go by
                it.
            penalties: by name with their options, as in a config: `{"layer": {"strength": 2.0}}`.
            sparsifier: its options with its `name`.
            steps_per_epoch: for penalties with `warmup` or `ramp`, which are in epochs.
            targets: (N, …), those of `inputs`, for a sparsifier that needs a loss before training
                (snip); `loss` is of outputs and targets then.
            output: which of the network's outputs counts, if it returns several: a key, an
                attribute or a place.
            seed: of what is drawn, such as the first masks of rigl.
            trained: whether the network has trained weights, so that `channels` takes out channels
                early, unless its options say when.

        Raises:
            UserError: if an option is unknown or out of range, or what is asked for has nothing to
                act on in this network.
        """
        asked = validated(
            Asked, {"penalties": penalties or {}, "sparsifier": sparsifier}, "Slimming"
        )
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            # Of a wrapper, such as Accelerate's.
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        _check_arguments(network, optimizer, steps)
        self.steps = steps
        self.steps_per_epoch = _per_epoch(asked, steps_per_epoch)
        self.optimizer = optimizer
        self.network = unwrapped(network)
        check_optimizer(optimizer, self.network, asked.penalties)
        self.output = output
        sample = as_one(inputs)
        view = as_called_with(self.network, sample, output)
        self._rise = _Rise(optimizer, asked.penalties)
        self._relative = {
            name
            for name, options in asked.penalties.items()
            if isinstance(options, GroupPenalty) and options.relative
        }
        penalties_by_name = self._absolute(asked.penalties, view, sample)
        asked = asked.model_copy(update={"penalties": penalties_by_name})
        setting = Setting(
            model=view,
            optimizer=optimizer,
            total_steps=steps,
            seed=seed,
            examples=_examples(sample, targets),
            loss=_loss_of(loss, targets),
            broadcast_from_rank0=_broadcast,
            trained=trained,
        )
        self.acting = Acting(asked, view, sample, setting)
        self.step = 0
        self._asked = asked
        self._sample = sample
        self._parameters = dict(self.network.named_parameters())
        self._unseen: set[str] = set()
        self._loss_was_asked = False
        self._copy: tuple[nn.Module, Acting] | None = None
        self._check_what_acts()
        for penalty in self.acting.penalties:
            if isinstance(penalty, ActiveFeatures):
                # A network that is compiled later keeps the hooks that it has at its first run.
                penalty.features.stay()
        self._watch()

    @property
    def sparsifier(self) -> ActiveSparsifier | None:
        """The sparsifier at work, with its masks by the name of the parameter."""
        return self.acting.sparsifier

    def _absolute(
        self, penalties: Mapping[str, Penalty], view: nn.Module, sample: Tensor
    ) -> dict[str, Penalty]:
        """The penalties with strengths as the steps take them, for steps as long as now."""
        size = float(step_sizes(self.optimizer).largest) or self._rise.first
        if self._relative and size == 0:
            raise UserError(
                "Slimming: the learning rate is 0, and strengths that are relative are so to the "
                "steps of a training; make Slimming while the optimizer has a learning rate"
            )

        def total_step(options: Penalty) -> float:
            taken = []
            for step in range(self.steps):
                epoch = step / self.steps_per_epoch
                scale = options.scale(epoch)
                taken.append(size * scale)
            return sum(taken)

        return absolute(penalties, view, sample, total_step)

    @property
    def targets(self) -> dict[str, int]:
        """On how many groups of weights, or stages of layers, each penalty acts."""
        penalties = self._asked.penalties
        names = [name for name, options in penalties.items() if options.on]
        targets = {}
        for name, penalty in zip(names, self.acting.penalties, strict=True):
            targets[name] = penalty.targets
        return targets

    def loss(self) -> Tensor:
        """What the penalties add to the loss of the batch that the network has just seen: a scalar,
        0 where none acts by its gradient."""
        self._loss_was_asked = True
        self._say_if_unseen()
        found = self.acting.losses()
        # The next part of a batch, where gradients are accumulated, is looked at too.
        self._watch()
        if found:
            return torch.stack(found).sum()
        return next(self.network.parameters()).new_zeros(())

    def before_step(self) -> None:
        """Call it between the backward pass and the optimiser's step: zeroes the gradients of
        dropped weights."""
        self.acting.before_step(self.step)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call it after the optimiser's step: takes the penalties' proximal steps, and updates and
        applies the masks."""
        self.acting.after_step(self.step, step_sizes(self.optimizer))
        self._rise.say_if_far()
        self.step += 1
        self._watch()

    @property
    def progress(self) -> float:
        """How far training is, 0 to 1, as a schedule of the learning rate should see it: with
        `lottery` it begins anew in each round."""
        if self.sparsifier is not None:
            return self.sparsifier.progress(self.step)
        return min(1.0, self.step / self.steps)

    @torch.no_grad()
    def apply_to(self, other: nn.Module) -> None:
        """Gives a copy of the network, such as an average of its weights, the same zeros, and the
        same inactive layers; call it before the copy is used.

        Raises:
            UserError: if it is no copy of the network.
        """
        twin = unwrapped(other)
        own = dict(self.network.named_parameters())
        theirs = dict(twin.named_parameters())
        if _shapes(own) != _shapes(theirs):
            raise UserError(
                "Slimming.apply_to: the parameters of the network given are others than those of "
                "the network in training; give a copy of it"
            )
        for name, parameter in own.items():
            copied_parameter = theirs[name]
            alive = parameter != 0
            copied_parameter.mul_(alive.to(copied_parameter.device))
        acting = self._acting_on(twin)
        pairs = zip(self.acting.penalties, acting.penalties, strict=True)
        for penalty, twins in pairs:
            if isinstance(penalty, ActiveGroups) and isinstance(twins, ActiveGroups):
                twins.finish_where(penalty)

    def _acting_on(self, twin: nn.Module) -> Acting:
        """The same penalties on a copy of the network; found once for the same copy."""
        if self._copy is not None:
            known, acting = self._copy
            if known is twin:
                return acting
        sample = _beside(self._sample, twin)
        view = as_called_with(twin, sample, self.output)
        acting = Acting(self._asked, view, sample, None)
        self._copy = twin, acting
        return acting

    def compact(
        self,
        inputs: Any = None,
        options: Compaction | Mapping[str, Any] | None = None,
        *,
        network: nn.Module | None = None,
    ) -> Compacted:
        """A smaller network with the same outputs in evaluation mode; the network in training is
        left as it is.

        Args:
            inputs: real inputs on which both are compared, as the network is called; those that
                Slimming was made with if None.
            options: of compaction, as in a config.
            network: a copy to make compact instead, such as an average of the weights, after
                `apply_to`.

        Returns:
            The network, which is called as the one in training was, with what was done and its
            measures.

        Raises:
            TrialFailure: if compaction changed the outputs.
            UserError: if the network cannot be traced.
        """
        if isinstance(options, Mapping):
            options = validated(Compaction, options, "Slimming")
        self._say_if_early()
        given = self._sample
        if inputs is not None:
            given = as_one(inputs)
        whole = self.network
        if network is not None:
            whole = unwrapped(network)
        twin = copied(whole)
        remove_hooks(twin)
        self._zero_again(twin)
        given = _beside(given, twin)
        view = as_called_with(twin, given, self.output)
        made = compact(view, given, options)
        if not isinstance(given, Several):
            return made
        names = in_order_of_forward(whole, list(given.named))
        by_arguments = ByArguments(made.network, names)
        by_arguments.eval()
        return Compacted(by_arguments, made.report)

    @torch.no_grad()
    def _zero_again(self, twin: nn.Module) -> None:
        """Has the masks hold in a copy of the network, which may have been changed since the last
        step."""
        if self.sparsifier is None:
            return
        parameters = dict(twin.named_parameters(remove_duplicate=False))
        changed = []
        for name, mask in self.sparsifier.masks.items():
            parameter = parameters[name]
            mask = mask.to(parameter.device)
            if bool((parameter[~mask] != 0).any()):
                parameter.mul_(mask)
                changed.append(f"'{name}'")
        if changed:
            log.warning(
                "weights that the sparsifier has zeroed were not 0 any more, as where an average "
                "of weights took the network's place, and were zeroed again: %s",
                first_few(changed),
            )

    def state_dict(self) -> dict[str, Any]:
        """All that continuing needs beside the network's and the optimiser's: plain data and
        tensors."""
        masks = {}
        if self.sparsifier is not None:
            masks = self.sparsifier.state_dict()
        strengths = {}
        for name, options in self._asked.penalties.items():
            if name in self._relative and isinstance(options, GroupPenalty):
                strengths[name] = {"strength": options.strength, "layers": options.layers}
        return {"step": self.step, "sparsifier": masks, "strengths": strengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues bit-exactly where `state_dict` was taken, once the network's and the
        optimiser's are loaded.

        Strengths and options are those that Slimming was made with, but for relative strengths,
        which are relative to the weights that the training began with.

        Raises:
            UserError: if the state is of another network, or of another sparsifier.
        """
        if not isinstance(state.get("step"), int):
            raise UserError("Slimming.load_state_dict: this is not what Slimming.state_dict gave")
        masks = state.get("sparsifier", {})
        if masks and self.sparsifier is None:
            raise UserError(
                "Slimming.load_state_dict: the state is of a training with a sparsifier, and this "
                "one has none"
            )
        if self.sparsifier is not None:
            try:
                self.sparsifier.load_state_dict(masks)
            except (KeyError, RuntimeError, ValueError) as error:
                raise UserError(
                    "Slimming.load_state_dict: the state is of another network, or of another "
                    f"sparsifier ({type(error).__name__}: {error})"
                ) from None
        self.step = state["step"]
        self._take_strengths(state.get("strengths", {}))
        self._watch()

    def _take_strengths(self, strengths: Mapping[str, Any]) -> None:
        """Those of the weights that the training began with, to which they may be relative."""
        asked = self._asked
        penalties = dict(asked.penalties)
        for name in self._relative.intersection(strengths):
            own = strengths[name]
            before = penalties[name]
            penalties[name] = before.model_copy(update=dict(own))
        self._asked = asked.model_copy(update={"penalties": penalties})
        pairs = zip(self.targets, self.acting.penalties, strict=True)
        for name, penalty in pairs:
            options = penalties[name]
            if isinstance(penalty, ActiveGroups) and isinstance(options, GroupPenalty):
                penalty.options = options

    def close(self) -> None:
        """Takes everything off the network that was attached to it; its weights stay as they
        are."""
        self.acting.close()
        if self._copy is not None:
            self._copy[1].close()
            self._copy = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        epoch = self.step / self.steps_per_epoch
        self.acting.watch(self.step, epoch)

    def _check_what_acts(self) -> None:
        """Refuses penalties without a target, and names what is left alone."""
        try:
            self._refuse_idle()
        except UserError:
            self.close()
            raise
        for name, options in self._asked.penalties.items():
            if not options.on:
                log.warning("penalties.%s does nothing: its strength is 0", name)
        asked = self._asked.sparsifier
        if asked is not None and not asked.on:
            log.warning("the sparsifier does nothing: its sparsity is 0")
        dense = out_of_reach(self.network)
        if self.sparsifier is not None and dense:
            log.warning(
                "%s weights stay dense, whatever the sparsity: no sparsifier acts on %s",
                f"{sum(dense.values()):,}",
                first_few([f"'{name}'" for name in dense]),
            )

    def _refuse_idle(self) -> None:
        sizes = step_sizes(self.optimizer)
        for name, penalty in zip(self.targets, self.acting.penalties, strict=True):
            if penalty.targets == 0:
                problem = self._asked.penalties[name].nothing_to_do
                raise UserError(f"penalties.{name}: {problem}; leave it out")
            if not isinstance(penalty, ActiveGroups):
                continue
            frozen = penalty.not_trained(sizes)
            if len(frozen) == penalty.targets:
                raise UserError(
                    f"penalties.{name}: all that it acts on is not trained: it requires no "
                    "gradient, or is in no parameter group of the optimiser; leave it out"
                )
            if frozen:
                log.warning(
                    "penalties.%s leaves alone what is not trained: %s",
                    name,
                    first_few([f"'{group}'" for group in frozen]),
                )

    def _say_if_unseen(self) -> None:
        for name, penalty in zip(self.targets, self.acting.penalties, strict=True):
            if not isinstance(penalty, ActiveFeatures) or name in self._unseen:
                continue
            if penalty.features.watching and not penalty.features.kept:
                self._unseen.add(name)
                log.warning(
                    "penalties.%s has seen no features of this batch: call loss() after a forward "
                    "pass with gradients, and make Slimming before a compiled network is first run",
                    name,
                )

    def _say_if_early(self) -> None:
        now = dict(self.network.named_parameters())
        replaced = [
            f"'{name}'" for name, own in self._parameters.items() if now.get(name) is not own
        ]
        if replaced:
            log.warning(
                "parameters were replaced after Slimming was made, and nothing acts on the new "
                "ones; make Slimming when the network has the parameters that are trained: %s",
                first_few(replaced),
            )
        if self.step == 0 and self.targets:
            log.warning(
                "penalties have done nothing: after_step was never called; call it after each step "
                "of the optimizer"
            )
        elif not self._loss_was_asked and self.acting.losses():
            log.warning("penalties have done nothing by their gradient: loss() was never called")
        if self.sparsifier is None or self.step >= self.steps:
            return
        left = [step for step in range(self.step, self.steps) if self.sparsifier.due(step)]
        if left:
            log.warning(
                "the sparsifier is not at its target: %d of %d steps were taken, and it changes "
                "its masks until step %d",
                self.step,
                self.steps,
                left[-1] + 1,
            )


def unwrapped(network: nn.Module) -> nn.Module:
    """The network within DistributedDataParallel, torch.compile or AveragedModel."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if isinstance(network, _WRAPPERS):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_arguments(network: object, optimizer: object, steps: object) -> None:
    """Raises UserError for what is something else than it should be."""
    if not isinstance(network, nn.Module):
        raise UserError(f"Slimming: the network is a {_kind(network)}; give a torch.nn.Module")
    if not hasattr(optimizer, "param_groups"):
        raise UserError(
            f"Slimming: the optimizer is a {_kind(optimizer)}; give the torch.optim.Optimizer that "
            "trains the network"
        )
    if isinstance(steps, bool) or not isinstance(steps, Integral) or int(steps) < 1:
        raise UserError(
            f"Slimming: steps is {steps!r}; it must be the optimiser steps to come, a whole number "
            "from 1"
        )


def _kind(given: object) -> str:
    if isinstance(given, type):
        return f"class, {given.__name__}"
    return type(given).__name__


def _beside(inputs: Tensor, network: nn.Module) -> Tensor:
    """The inputs on the device of a network."""
    device = next(network.parameters()).device
    return each(inputs, lambda tensor: tensor.to(device))


def _per_epoch(asked: Asked, steps_per_epoch: int | None) -> int:
    """How many steps an epoch has, for penalties that rise over epochs."""
    rising = []
    for name, options in asked.penalties.items():
        rises = options.warmup or options.ramp
        if options.on and rises:
            rising.append(name)
    if steps_per_epoch is None and rising:
        raise UserError(
            f"Slimming: penalties.{rising[0]} has a warmup or ramp, which is in epochs; give "
            "steps_per_epoch"
        )
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise UserError(f"Slimming: steps_per_epoch is {steps_per_epoch}; it must be at least 1")
    return steps_per_epoch or 1


def _examples(sample: Tensor, targets: Tensor | None) -> Examples:
    def examples(count: int) -> Split:
        inputs = sample[:count]
        if targets is not None:
            wanted = targets[:count]
            return Split(inputs, wanted)
        size = len(inputs)
        none = torch.zeros(size, dtype=torch.int64)
        return Split(inputs, none)

    return examples


def _loss_of(loss: Loss | None, targets: Tensor | None) -> Loss:
    if loss is not None and targets is not None:
        return loss

    def missing(_outputs: Any, _targets: Any) -> Tensor:
        raise UserError(
            "Slimming: the sparsifier looks at the loss before training; give the targets of the "
            "inputs, and the loss"
        )

    return missing


def _broadcast(given: Iterable[Tensor]) -> None:
    """Gives all processes of a training the tensors of the first."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in given:
        as_bytes = tensor.to(torch.uint8)
        dist.broadcast(as_bytes, src=0)
        tensor.copy_(as_bytes)
