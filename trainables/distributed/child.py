"""A process that is led by rank 0 of a training, over a pipe: it gets `Welcome`, then commands, and
answers each with `Reply`.

It ends when the pipe is closed, however that came.
"""

import io
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.ranks import Group, join

State = dict[str, Any]
"""Tensors and plain data."""


@dataclass(frozen=True)
class Welcome:
    """What a process is told first."""

    rank: int
    size: int
    device: torch.device
    threads: int
    port: int
    timeout_s: float


@dataclass(frozen=True)
class Reply:
    """The answer to a command: an `error` that any process of the training would have, or what
    `broke` in this one alone."""

    value: bytes | None = None
    error: TrialFailure | UserError | None = None
    broke: str | None = None


def packed(state: State) -> bytes:
    """Tensors and plain data as bytes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def unpacked(content: bytes, device: torch.device) -> State:
    """What `packed` made bytes of, its tensors on `device`: it may come from the device of another
    process."""
    file = io.BytesIO(content)
    state: State = torch.load(file, weights_only=True, map_location=device)
    return state


class Child:
    """The training in a process that is not rank 0."""

    def __init__(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.training: Training | None = None

    def begin(self, candidate: dict[str, Any]) -> None:
        """Takes the next training; nothing of the last one stays."""
        if self.training is not None:
            self.training.close()
        self.training = None
        welcome = self.welcome
        group = Group(welcome.rank, welcome.size, welcome.device)
        validated = Candidate.model_validate(candidate)
        self.training = Training(validated, welcome.device, group)

    def load(self, state: bytes) -> None:
        """Continues from the state that rank 0 continues from."""
        training = self._training()
        on_device = unpacked(state, self.welcome.device)
        training.load_state_dict(on_device)

    def run_epoch(self, shuffler: bytes) -> None:
        """Trains one epoch on the batches that rank 0 draws."""
        training = self._training()
        cpu = torch.device("cpu")
        state = unpacked(shuffler, cpu)
        training.shuffler.set_state(state["shuffler"])
        training.run_epoch()

    def state(self, _: None) -> bytes:
        """The state of the training here."""
        training = self._training()
        state = training.state_dict()
        return packed(state)

    def _training(self) -> Training:
        assert self.training is not None, "begin comes first"
        return self.training


def serve(connection: Connection) -> None:
    """Does what it is told, until the connection is closed."""
    connection.send("here")
    welcome: Welcome = connection.recv()
    commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(connection, commands), daemon=True)
    listener.start()
    torch.set_num_threads(welcome.threads)
    join(welcome.rank, welcome.size, welcome.device, welcome.port, welcome.timeout_s)
    child = Child(welcome)
    while True:
        command, argument = commands.get()
        try:
            act = getattr(child, command)
            value = act(argument)
            reply = Reply(value)
        except (TrialFailure, UserError) as error:
            reply = Reply(error=error)
        except Exception as error:
            # The others may wait for this rank: leaving tells them that they wait in vain.
            kind = type(error).__name__
            broken = Reply(broke=f"{kind}: {error}")
            connection.send(broken)
            raise
        connection.send(reply)


def _listen(connection: Connection, commands: "queue.SimpleQueue[tuple[str, Any]]") -> None:
    while True:
        try:
            commands.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # rank 0 is gone; the main thread may be waiting for it


def main() -> None:
    """Serves the pipe whose file descriptor is the first argument of this process."""
    # Ctrl-C reaches all processes of a terminal; rank 0 decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(Connection(int(sys.argv[1])))
