"""What the processes of one training, its ranks, do together: share batches, average gradients,
agree.

All ranks draw the same batches, and each takes its share. What they hold is the same on all of them
after every step, bit by bit: weights, because gradients are averaged; the statistics of batch
norms, which are averaged too; and masks, which are rank 0's.
"""

import os
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from slimfront.trainables.data import Dataset
from slimfront.trainables.environment import environment_set
from slimfront.trainables.errors import UserError
from slimfront.trainables.gpu import gpus_among
from slimfront.trainables.structure.copying import copied
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.torch_internals import abort_process_group
from slimfront.trainables.training.losses import Losses

LEAST_SHARE = 4
"""A batch with fewer examples per rank is taken whole by all: batch norms need two examples, and
CKA-SR needs four."""

_RANK_STREAM, _EPOCH_STREAM = 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1
"""Factors of rank and epoch in the seeds of augmentation and dropout."""


_leaving = threading.Lock()


class Solo:
    """The only process of its training: everything is its own."""

    rank, size = 0, 1

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """This rank's part of `batch` (N,), and the weight of its mean: the mean over the ranks is
        then that of the batch."""
        return batch, 1.0

    def wrap(self, losses: Losses, sample: Tensor, *, overlap: bool) -> nn.Module:
        """`losses`, whose parameters get averaged gradients; before its first call, all ranks have
        the same state.

        Args:
            sample: (N, *input_shape), what the network sees.
            overlap: average while the backward pass goes on; else, only `reduce` does.
        """
        return losses

    def broadcast_from_rank0(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks the values of rank 0, in place; before `wrap`, ranks are on their own,
        and nothing happens."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Gives all ranks the mean of their floating-point values, in place."""

    def reduce(self, parameters: Iterable[nn.Parameter], short: bool) -> bool:
        """Averages the gradients, unless a rank is `short` of memory; whether one is."""
        return short

    def reseed(self, seed: int, epoch: int, augmenter: torch.Generator) -> None:
        """Gives each rank random numbers of its own in `epoch`; rank 0 goes on with those that a
        single process has."""

    def scores(self, network: nn.Module, data: Dataset) -> Tensor:
        """What the metrics of the validation split are made of (`ActiveTask.state`), (n,), float64,
        on the network's device."""
        return data.task.state(network, *data.validation, prepare=data.prepare)


class Group(Solo):
    """One of several ranks; `join` must have been called in each of their processes."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.met = False

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """The rank-th of equal parts, or all of a batch that is too small to be parted."""
        count = len(batch)
        if count < LEAST_SHARE * self.size:
            return batch, 1.0
        parts = batch.tensor_split(self.size)
        mine = parts[self.rank]
        examples = len(mine)
        weight = examples * self.size / count
        return mine, weight

    def wrap(self, losses: Losses, sample: Tensor, *, overlap: bool) -> nn.Module:
        """In DistributedDataParallel, unless gradients must wait for `reduce`."""
        self.met = True
        self.broadcast_from_rank0([*losses.parameters(), *losses.buffers()])
        if not overlap:
            return losses
        device_ids = None
        if self.device.type == "cuda":
            device_ids = [self.device]
        with warnings.catch_warnings():
            # A new name for broadcast_buffers, not known to all torch that we take.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                losses,
                device_ids=device_ids,
                broadcast_buffers=False,  # they are averaged instead
                init_sync=False,
                find_unused_parameters=_may_leave_out(losses.model, sample),
            )

    @torch.no_grad()
    def broadcast_from_rank0(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast from rank 0."""
        if not self.met:
            return
        with _flat(tensors) as flats:
            for flat in flats:
                dist.broadcast(flat, src=0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """All-reduce."""
        with _flat(tensors) as flats:
            for flat in flats:
                dist.all_reduce(flat)
                flat /= self.size

    def reduce(self, parameters: Iterable[nn.Parameter], short: bool) -> bool:
        """All-reduce, of the flags first; a gradient that no rank has stays None."""
        parameters = list(parameters)
        own = [parameter.grad is not None for parameter in parameters]
        flags = torch.tensor([short, *own], dtype=torch.uint8, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        any_short, *wanted = flags.tolist()
        if any_short:
            return True
        gradients = []
        for parameter, needed in zip(parameters, wanted, strict=True):
            if not needed:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.average(gradients)
        return False

    def reseed(self, seed: int, epoch: int, augmenter: torch.Generator) -> None:
        """From the seed, the epoch and the rank, so that nothing of them must be kept in a
        checkpoint."""
        if not self.rank:
            return
        of_rank = self.rank * _RANK_STREAM
        of_epoch = epoch * _EPOCH_STREAM
        mixed = seed + of_rank + of_epoch
        mixed %= 2**63
        augmenter.manual_seed(mixed)
        torch.manual_seed(mixed + 1)

    def scores(self, network: nn.Module, data: Dataset) -> Tensor:
        """Each rank computes the outputs of a share of the examples."""
        own = slice(self.rank, None, self.size)
        everything = data.validation
        inputs = everything.inputs[own]
        targets = everything.targets[own]
        task = data.task
        if task.mergeable:
            total = torch.zeros(task.width, dtype=torch.float64, device=self.device)
            if len(targets):
                total += task.state(network, inputs, targets, prepare=data.prepare)
            dist.all_reduce(total)
            return total
        # A metric that is no sum over examples needs all outputs in one place.
        outputs = None
        if len(targets):
            outputs = task.outputs_of(network, inputs, prepare=data.prepare)
        tally = task.tally()
        count = len(everything.targets)
        shares = self._gather(outputs, count)
        for rank, part in enumerate(shares):
            if len(part):
                wanted = everything.targets[rank :: self.size]
                task.count(tally, part, wanted)
        return tally.state()

    def _gather(self, outputs: Tensor | None, count: int) -> list[Tensor]:
        """The outputs (n, …) of each rank's share of `count` examples, None for no share."""
        shape = self._shape_at_rank0(outputs)
        padded = torch.zeros(shape, device=self.device)
        if outputs is not None:
            own = len(outputs)
            padded[:own] = outputs
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        shares = []
        for rank, part in enumerate(gathered):
            places = range(rank, count, self.size)
            own = len(places)
            shares.append(part[:own])
        return shares

    def _shape_at_rank0(self, outputs: Tensor | None) -> list[int]:
        """That of rank 0's outputs: it has a share if any rank has, and none has more."""
        shape = torch.zeros(8, dtype=torch.int64, device=self.device)
        if self.rank == 0 and outputs is not None:
            axes = outputs.dim()
            shape[:axes] = torch.tensor(outputs.shape)
        dist.broadcast(shape, 0)
        return [size for size in shape.tolist() if size]


def _may_leave_out(model: nn.Module, sample: Tensor) -> bool:
    """Whether a batch may come with parameters that its outputs do not depend on; looking for them
    in each takes time."""
    try:
        trace(model)
    except UserError:
        return True  # it may decide by its inputs what it computes
    twin = copied(model)
    twin.train()
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    gpus = gpus_among(sample.device)
    with torch.random.fork_rng(devices=gpus):
        total = twin(sample).sum()
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


@contextmanager
def _flat(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """One tensor per type with all entries of `tensors`, which take what becomes of it: one message
    instead of many."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        alike = kinds.setdefault(tensor.dtype, [])
        alike.append(tensor)
    flats = []
    for alike in kinds.values():
        rows = [tensor.flatten() for tensor in alike]
        flat = torch.cat(rows)
        flats.append(flat)
    yield flats
    for flat, alike in zip(flats, kinds.values(), strict=True):
        _take_parts(alike, flat)


def _take_parts(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Gives tensors the entries of `flat`, one behind the other."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = flat.split(sizes)
    for tensor, part in zip(tensors, parts, strict=True):
        values = part.view_as(tensor)
        tensor.copy_(values)


def listen() -> socket.socket:
    """A socket on loopback, at a port that is free, for the ranks to meet at."""
    return socket.create_server(("127.0.0.1", 0))


def join(
    rank: int,
    size: int,
    device: torch.device,
    port: int,
    timeout_s: float,
    listener: socket.socket | None = None,
) -> None:
    """Connects this process with the others of a training; returns when all `size` of them have
    called it.

    Args:
        port: of the socket that rank 0 gives as `listener`.
        timeout_s: how long to wait for another rank, here and later.
    """
    timeout = timedelta(seconds=timeout_s)
    descriptor = None
    if listener is not None:
        descriptor = listener.detach()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _environment():
        store = TCPStore(
            "127.0.0.1",
            port,
            size,
            rank == 0,
            timeout,
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
        backend = "gloo"
        if device.type == "cuda":
            backend = "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def leave() -> None:
    """Ends what `join` began, whatever state the others are in; calls that wait for them raise."""
    with _leaving:
        if dist.is_initialized():
            abort_process_group()


def _environment() -> AbstractContextManager[None]:
    """Within, Gloo talks over loopback; a call of NCCL that is given up raises, where by default it
    would end the process."""
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            wanted["GLOO_SOCKET_IFNAME"] = name
            break
    missing = {}
    for name, value in wanted.items():
        if name not in os.environ:
            missing[name] = value
    return environment_set(missing)
