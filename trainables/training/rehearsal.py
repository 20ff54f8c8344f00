"""One real step on a copy, before training: what cannot be trained, made compact, kept or shipped
is found out at once."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.compaction import compact
from slimfront.trainables.data import Dataset, Split
from slimfront.trainables.data.look import looked_at
from slimfront.trainables.data.text import MASK, trimmed
from slimfront.trainables.depth import shallower
from slimfront.trainables.errors import (
    OF_USERS_CODE,
    TrialFailure,
    UserError,
    first_few,
    first_line,
    first_line_of,
)
from slimfront.trainables.inputs import Several, described, each, tensors
from slimfront.trainables.models import built
from slimfront.trainables.penalties.node import NodeSparsity
from slimfront.trainables.shipping.formats import why_not_exported
from slimfront.trainables.shipping.int8 import as_int8
from slimfront.trainables.shipping.network_file import check_storable, restore, store
from slimfront.trainables.sparsifiers.base import frozen_growth, out_of_reach
from slimfront.trainables.structure.agreement import Probe, difference, outputs
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.graph import Layer
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating
from slimfront.trainables.training.finishing import Finishing, measure_own
from slimfront.trainables.training.freezing import training_mode
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.losses import Losses
from slimfront.trainables.training.own_loop import function_of
from slimfront.trainables.training.slimming.what_goes import name_what_does_not_last

_SAMPLES = 16
"""So many real inputs are looked at."""
_TOLERANCE = 1e-4

log = logging.getLogger(__name__)


def rehearse(candidate: Candidate, device: torch.device | str = "cpu") -> None:
    """Builds the candidate's network and takes it through all that training will do with it, once;
    nothing of it stays.

    On a full batch and on the last, smaller one of an epoch: forward, backward, optimiser,
    penalties and an update of the sparsifier; then compaction, storing and, where a network is not
    kept as a graph, what exporting begins with.

    Raises:
        UserError: one sentence that names what cannot be done, and the module where that is known.
    """
    candidate = candidate.with_a_teacher()
    _find_function(candidate)
    data = looked_at(candidate.data, torch.device(device), candidate.task)
    _build_and_run(candidate, data)
    # The network as the user wrote it: traced, it goes one way for all inputs.
    whole = candidate.model_copy(update={"depth": candidate.depth.when_trained()})
    with _naming(None, "the network cannot be trained"):
        training = Training(whole, device)
    try:
        _Rehearsal(training).run()
    finally:
        training.close()
    if candidate.depth.closes:
        _close_layers(candidate, device)


def look_at(candidate: Candidate, device: torch.device | str = "cpu") -> None:
    """Builds the candidate's network and all that acts on it, and takes no step: whether what it
    names is there.

    Raises:
        UserError: one sentence that names what is not.
    """
    _find_function(candidate)
    whole = candidate.with_a_teacher()
    whole = whole.model_copy(update={"depth": whole.depth.when_trained()})
    with _naming(None, "the network cannot be trained"):
        training = Training(whole, device)
    try:
        refuse_idle_penalties(training)
    finally:
        training.close()


def _find_function(candidate: Candidate) -> None:
    """Raises UserError if there is no such function of the user's that trains. It is not called."""
    if candidate.training.factory is not None:
        function_of(candidate)


def refuse_idle_penalties(training: Training) -> None:
    """Raises UserError for a penalty that finds nothing in the network to act on."""
    options_by_name = training.candidate.penalties
    names = [name for name, options in options_by_name.items() if options.on]
    for name, active in zip(names, training.penalties, strict=True):
        if active.targets == 0:
            problem = options_by_name[name].nothing_to_do
            raise UserError(f"penalties.{name}: {problem}; leave it out, or choose another model")


def _build_and_run(candidate: Candidate, data: Dataset) -> None:
    """Before sparsifiers and penalties look at the network, which fail in words of their own."""
    with torch.random.fork_rng():
        with _naming(None, "the network cannot be built"):
            network = built(candidate.model, data)
            network.to(data.device)
        run_once(network, data)


@torch.no_grad()
def run_once(network: nn.Module, data: Dataset) -> Tensor:
    """Runs a network on a few training examples, takes the metrics of what it makes of them, and
    returns that.

    Raises:
        UserError: if it does not take them, or makes anything else than the task needs.
    """
    with evaluating(network), torch.random.fork_rng():
        stored = data.train.inputs[:_SAMPLES]
        sample = data.prepare(stored)
        check_whole_numbers(network, sample)
        with _naming(network, "the network cannot be run"):
            found = network(sample)
        count = len(sample)
        _check_outputs(data, found, count)
        with _naming(None, "a metric of the task cannot be taken"):
            targets = data.train.targets[:count]
            tally = data.task.tally()
            data.task.count(tally, found, targets)
            tally.state()
    outputs: Tensor = found
    return outputs


@torch.no_grad()
def check_whole_numbers(network: nn.Module, sample: Tensor) -> None:
    """Refuses a network that takes real numbers only, where the inputs are whole ones.

    Raises:
        UserError: if it fails on `sample`, and does not on the same in float32.
    """
    if all(tensor.is_floating_point() for tensor in tensors(sample).values()):
        return
    network = copied(network).eval()
    try:
        network(sample)
    except Exception as error:
        try:
            network(each(sample, lambda tensor: tensor.float()))
        except Exception:
            return  # it fails in another way, which is told of where it does
        raise UserError(
            f"the network does not take the inputs, {described(sample)}, which stay whole numbers "
            f"({type(error).__name__}: {first_line(error)}); if they are quantities, set "
            "data.normalise to per_feature or global, and they become float32"
        ) from None


def _close_layers(candidate: Candidate, device: torch.device | str) -> None:
    """Takes a step with layers half closed, and one without them."""
    with _naming(None, "layers of the network cannot be closed while it is trained"):
        training = Training(candidate, device)
    closing = training.closing
    assert closing is not None
    names = [name for name, options in candidate.penalties.items() if options.on]
    try:
        for name, active in zip(names, training.penalties, strict=True):
            if active.targets == 0:
                raise UserError(
                    f"penalties.{name} finds no layer in the traced network, whose layers depth "
                    "closes; name layers of torch.nn, or set depth.when to trained"
                )
        for epoch in (closing.first, closing.last):
            training.epoch = epoch
            training.step = epoch * training.steps_per_epoch()
            with _naming(None, "the network cannot be trained with closing layers"):
                next(training.steps())
    finally:
        training.close()


class _Rehearsal:
    """The rehearsal of one training, which is used up by it."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = training.model
        data = training.data
        stored = data.train.inputs[:_SAMPLES]
        self.sample = data.prepare(stored)

    def run(self) -> None:
        """All of it, in the order in which training comes to it."""
        refuse_idle_penalties(self.training)
        self._name_what_stays_dense()
        initial = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._check_outputs()
        self._check_trace()
        self._name_what_cannot_go()
        try:
            if self.training.options.factory is not None:
                pass  # the step is the user's
            elif self.training.options.epochs:
                self._take_steps()
            else:
                self.training.prune_untrained()
        except torch.OutOfMemoryError:
            # Whether there is more memory later, and whether batches may be halved, is for training
            # to see.
            return
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
            self.model.load_state_dict(initial)  # it diverges, which is a result and no mistake
        self._compact_and_keep()

    def _name_what_stays_dense(self) -> None:
        """Warns of layers that no sparsifier reaches: its sparsity counts the others alone."""
        sparsifier = self.training.sparsifier
        options = self.training.candidate.sparsifier
        if sparsifier is None or options is None:
            return
        frozen = frozen_growth(options, self.model)
        if frozen:
            log.warning(
                "sparsifier %s moves weights, and what it grows in frozen layers stays 0; set "
                "sparsifier.exclude to these layers: %s",
                options.name,
                first_few(frozen),
            )
        name_what_does_not_last(self.model, self.sample, sparsifier)
        dense = out_of_reach(self.model, sparsifier.masks)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if not dense:
            return
        layers = sorted({name.rpartition(".")[0] or name for name in dense})
        log.warning(
            "%s of %s weights stay dense, whatever sparsifier.sparsity says: no sparsifier acts on "
            "%s",
            f"{sum(dense.values()):,}",
            f"{total:,}",
            _quoted(layers),
        )

    def _name_what_cannot_go(self) -> None:
        """Warns of layers whose units a node penalty makes zero, and compaction cannot remove: of a
        copy, a unit of each is."""
        compaction = self.training.candidate.compaction
        nodes = [each for each in self.training.penalty_options if isinstance(each, NodeSparsity)]
        if not nodes or not compaction.enabled:
            return
        options = nodes[0]
        zeroed = copied(self.model)
        groups = options.attach(zeroed, self.sample).groups
        acted_on = {name for name in groups if options.layers.get(name, options.strength) > 0}
        for name in acted_on:
            _zero_a_unit(groups[name])
        told = {name for name, _ in zeroed.named_modules()}
        try:
            one_by_one = compaction.model_copy(update={"multiple": 1})
            steps = compact(zeroed, self.sample, one_by_one, told)
        except (UserError, TrialFailure):
            return  # which is told of where the network is made compact as it is
        stay = []
        for name, action, _ in steps.report.steps:
            if action == "zeros stay" and name in acted_on:
                stay.append(name)
        if stay:
            log.warning(
                "penalties.node makes units of %s zero that compaction cannot remove, since what "
                "follows does not keep zeros apart; give these layers 0 in penalties.node.layers",
                _quoted(stay),
            )

    def _check_outputs(self) -> None:
        """Whether the network gives what the task takes, and the same each time in evaluation
        mode."""
        training = self.training
        with (
            _naming(self.model, "the network cannot be run"),
            torch.no_grad(),
            training.own_rng_state(),
            evaluating(self.model),
        ):
            first = self.model(self.sample)
            second = self.model(self.sample)
        _check_outputs(training.data, first, len(self.sample))
        if difference(first, second, _TOLERANCE, both_nan=True) > _TOLERANCE:
            raise UserError(
                "the network draws random numbers in evaluation mode, so that no two of its "
                "outputs are equal; give a functional "
                "dropout `training=self.training`"
            )

    def _check_trace(self) -> None:
        """Whether the traced network computes what the network does; one that cannot be traced is
        told of elsewhere."""
        for mode in (False, True):
            self.model.train(mode)
            try:
                traced = trace(self.model)
            except UserError:
                return
            with (
                _naming(self.model, "the network cannot be run"),
                torch.random.fork_rng(devices=[]),
            ):
                probe = Probe(self.model, self.sample)
                repeats = probe.difference(self.model, _TOLERANCE) <= _TOLERANCE
            if repeats and probe.difference(traced, _TOLERANCE) > _TOLERANCE:
                where = "evaluation"
                if mode:
                    where = "training"
                raise UserError(
                    f"{type(self.model).__name__}.forward goes another way for other inputs (in "
                    f"{where} mode), which its traced "
                    "form does not; write it without branches that depend on data or on the size "
                    "of a batch"
                )

    def _take_steps(self) -> None:
        training = self.training
        data = training.data
        training_mode(self.model, training.options.freeze)
        training.losses = Losses(
            self.model, training.acting, training.taught.task, bf16=training.options.bf16
        )
        count = len(data.train.targets)
        size = training.options.batch_size
        whole = min(size, count)
        self._take_short_batch(whole)
        self._take_step(_last_due(training), whole)
        rest = count % size
        if count > size and rest:
            of = " the last batch of an epoch, of"
            self._take_step(0, rest, of, "; set training.batch_size to another number")

    def _take_step(self, step: int, examples: int, of: str = "", advice: str = "") -> None:
        """One step as `step`, on so many examples."""
        training = self.training
        plural = ""
        if examples > 1:
            plural = "s"
        problem = f"the network cannot be trained on{of} {examples} example{plural}"
        train = training.taught.train
        inputs = train.inputs[:examples]
        targets = train.targets[:examples]
        batch = Split(inputs, targets)
        with _naming(self.model, problem, advice), training.own_rng_state():
            training.step = step
            _check_outputs_of_step(training, batch)
            training.train_batch(batch, 1.0)

    def _take_short_batch(self, examples: int) -> None:
        """Where padding is cut off from batches, the network is tried on a shorter one."""
        data = self.training.data
        inputs = data.train.inputs
        if not isinstance(inputs, Several) or MASK not in inputs.named:
            return
        lengths = inputs[MASK].flatten(1).sum(1)
        shortest = lengths.argsort()[:examples]
        targets = data.train.targets[shortest]
        cut, targets = trimmed(inputs[shortest], targets)
        problem = (
            f"the network cannot be run on a batch whose padding was cut off, {described(cut)}"
        )
        with (
            _naming(self.model, problem),
            torch.no_grad(),
            _statistics_kept(self.model),
            self.training.own_rng_state(),
        ):
            found = self.model(data.prepare(cut))
        data.task.options.check_outputs(found, targets, data.head)

    def _compact_and_keep(self) -> None:
        candidate = self.training.candidate
        data = self.training.data
        if candidate.compaction.enabled:
            check_storable(self.model, self.sample)
        model = self.model
        if candidate.depth.on:
            model, _ = shallower(
                model,
                data,
                candidate.depth,
                candidate.latency,
                compaction=candidate.compaction,
            )
        with _naming(None, "the network cannot be made compact and kept"):
            network = compact(model, self.sample, candidate.compaction).network
            stored = store(network, candidate.model, data.input_shape, data.head, data.call)
            back = restore(stored, candidate.model)
            back = back.to(self.sample.device)
            made = outputs(network, self.sample)
            again = outputs(back, self.sample)
            if difference(made, again, _TOLERANCE, both_nan=True) > _TOLERANCE:
                raise UserError("the network is not the same after it was stored and read again")
        if "model" in stored:
            _check_shippable(network, self.sample)
        if candidate.latency.of_file:
            with _naming(None, "the network cannot be timed"):
                finishing = Finishing(candidate, data)
                finishing.timed(network)
        if candidate.int8:
            with _naming(None, "the network cannot be quantised to int8"):
                on_cpu = copied(network).cpu()
                int8 = as_int8(on_cpu, data)
                int8.scores(data, "val")
        if own := candidate.own_measures():
            with _naming(None, "the network cannot be measured"):
                measure_own(network, data, own)


def _check_shippable(network: nn.Module, sample: Tensor) -> None:
    """Refuses a network that is not kept as a graph, and that torch.export, the other way to ship
    it, does not take."""
    reason = why_not_exported(network, sample)
    if reason is not None:
        raise UserError(
            f"no format can ship this network: {reason}; write its forward without what is named, "
            "or leave that out"
        )


def _zero_a_unit(layer: Layer) -> None:
    weight = layer.layer.weight
    count = len(weight)
    units = torch.arange(count, device=weight.device)
    kept = units != count // 3
    factors = kept.to(weight)
    with torch.no_grad():
        layer.scale_rows(factors)


def _quoted(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return first_few([f"'{name}'" for name in names])


def _check_outputs(data: Dataset, found: object, count: int) -> None:
    targets = data.train.targets[:count]
    options = data.task.options
    options.check_outputs(found, targets, data.head)


def _check_outputs_of_step(training: Training, batch: Split) -> None:
    """In training mode a network may return something else: auxiliary outputs, say."""
    data = training.data
    model = training.model
    inputs = data.prepare(batch.inputs)
    with _statistics_kept(model):
        found = model(inputs)
    _check_outputs(data, found, len(batch.targets))
    if not found.requires_grad:
        raise UserError(
            f"what {type(model).__name__}.forward returns has no gradient, so that the network "
            "cannot be trained: its code detaches it, or runs under torch.no_grad()"
        )
    loss = data.task.loss(found, data.train.targets[: len(batch.targets)])
    if not loss.requires_grad:
        raise UserError(
            "the task's loss has no gradient, so that no network can be trained by it: its code "
            "detaches it, runs under torch.no_grad(), or chooses by argmax alone"
        )


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


def _last_due(training: Training) -> int:
    """The last step in which the sparsifier changes its masks, when as many weights are zero as
    ever; else the last step."""
    last = training.total_steps() - 1
    sparsifier = training.sparsifier
    if sparsifier is None:
        return last
    for step in range(last, -1, -1):
        if sparsifier.due(step):
            return step
    return last


@contextmanager
def _naming(model: nn.Module | None, problem: str, advice: str = "") -> Iterator[None]:
    """Turns whatever is raised within into one sentence, which names the module of `model` that was
    at work.

    No copies may be made of `model` within: they would carry its hooks.
    """
    within: list[str] = []
    names: dict[nn.Module, str] = {}
    if model is not None:
        names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _inputs: object) -> None:
        shown = type(module).__name__
        if names[module]:
            shown = f"'{names[module]}' ({shown})"
        within.append(shown)

    def leave(_module: nn.Module, _inputs: object, _outputs: object) -> None:
        within.pop()

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except OF_USERS_CODE as error:
        said = first_line_of(str(error))
        if not isinstance(error, TrialFailure):
            said = f"{type(error).__name__}: {said}"
        if within:
            said = f"{within[-1]} raised {said}"
        raise UserError(f"{problem}: {said}{advice}") from error
    finally:
        for handle in handles:
            handle.remove()
