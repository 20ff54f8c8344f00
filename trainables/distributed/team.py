"""Rank 0's side of a training on several processes: starts the others, leads them, and notices when
one is lost."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from slimfront.trainables.candidate import Candidate
from slimfront.trainables.distributed.child import Reply, Welcome, packed, unpacked
from slimfront.trainables.errors import TrialFailure, UserError
from slimfront.trainables.training.finishing import Number
from slimfront.trainables.training.loop import Training
from slimfront.trainables.training.ranks import Group, join, leave, listen

TIMEOUT_S = 600.0
"""So long a rank waits for another one that is alive but does not answer."""

_CHILD = "from slimfront.trainables.distributed.child import main; main()"

_BEGIN_S = 300.0
"""How long a process may take to import what it needs."""

_GRACE_S = 5.0
"""So long the others have to say what went wrong with them, once a call that joins them has
failed."""


class LostProcess(Exception):
    """A process of a training on several has died, was ended, or broke. The trial can go on from
    its last checkpoint."""


class Team:
    """The processes of a training, this one rank 0 of them; they stay for the next training, unless
    one of them is lost.

    There can be one team in a process at a time. The others end when it is closed, and when this
    process ends, however it does.
    """

    def __init__(
        self, size: int, device: str = "cpu", threads: int = 1, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Starts nothing yet.

        Args:
            size: how many processes.
            device: `cpu`, or `cuda` for a GPU each: rank r takes the r-th that this process can
                see.
            threads: of the CPU, for each process.
            timeout_s: how long a process may take longer than the others.
        """
        self.size = size
        self.threads = threads
        self.timeout_s = timeout_s
        self.devices = [
            torch.device("cuda", rank) if device == "cuda" else torch.device(device)
            for rank in range(size)
        ]
        self.children: dict[Connection, subprocess.Popen[bytes]] = {}
        self.replies: _Replies | None = None

    def training(self, candidate: Candidate) -> Training:
        """The training of a candidate on all ranks: to be used as a `Training` in this process.

        Raises:
            UserError: as `Training`; or if another team is at work in this process.
            LostProcess: if a process cannot be started.
        """
        if any(child.poll() is not None for child in self.children.values()):
            self.close()
        if not self.children:
            if dist.is_initialized():
                raise UserError(
                    "this process is in a group of torch.distributed already, such as another "
                    "team's; close that first"
                )
            self._start()
        return LedTraining(candidate, self)

    def _start(self) -> None:
        # Not by multiprocessing: it would run the main module again, which in a worker of Ray costs
        # a second each.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        }
        torch.set_num_threads(self.threads)
        for _ in range(1, self.size):
            ours, theirs = Pipe()
            command = [sys.executable, "-P", "-c", _CHILD, str(theirs.fileno())]
            self.children[ours] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
            theirs.close()
        try:
            for connection in self.children:
                if not connection.poll(_BEGIN_S):
                    raise TimeoutError(f"one did not begin for {_BEGIN_S:g} s")
                # That it is there: what can fail before ranks wait for each other has not failed.
                connection.recv()
            listener = listen()
            port = listener.getsockname()[1]
            for rank, connection in enumerate(self.children, 1):
                connection.send(
                    Welcome(
                        rank=rank,
                        size=self.size,
                        device=self.devices[rank],
                        threads=self.threads,
                        port=port,
                        timeout_s=self.timeout_s,
                    )
                )
            join(0, self.size, self.devices[0], port, self.timeout_s, listener)
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            reason = str(error) or "one ended at once"
            raise LostProcess(
                f"the {self.size} processes of a training cannot be started: {reason}"
            ) from error

    @contextmanager
    def along(self, command: str, argument: Any = None) -> Iterator[dict[int, bytes]]:
        """Has the other ranks do what the block does; after it, its value has what they answered,
        by rank.

        Raises:
            TrialFailure, UserError: what the block raised, which the others raise too; or one of
            the others alone.
            LostProcess: if one is lost. The team starts anew for the next training, as after any
                other exception.
        """
        answers: dict[int, bytes] = {}
        replies = self.replies = _Replies(self.children, self.devices[0].type == "cuda")
        failure: Exception | None = None
        try:
            replies.ask(command, argument)
            yield answers
        except (TrialFailure, UserError) as error:
            failure = error
        except Exception as error:
            lost = self._loss_behind(error, replies)
            self.close()
            if lost is not None:
                raise lost from error
            raise
        except BaseException:
            self.close()
            raise
        if not replies.complete(self.timeout_s):
            self.close()
            raise failure or self._no_answer()
        others = [reply.error for reply in replies.by_rank.values() if reply.error is not None]
        broken = replies.lost()
        if broken or bool(others) != (failure is not None):
            self.close()
        if failure := failure or broken or next(iter(others), None):
            raise failure
        answers |= replies.values()

    def _loss_behind(self, error: Exception, replies: "_Replies") -> LostProcess | None:
        """Which process is lost where `error` is of a call that waited for one; else None."""
        of_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not of_group and dist.is_initialized():
            return None
        # Which one it is is known a moment later.
        replies.trouble.wait(_GRACE_S)
        return replies.lost() or self._no_answer()

    def _no_answer(self) -> LostProcess:
        return LostProcess(
            f"one of the {self.size} processes of a training did not answer for "
            f"{self.timeout_s:g} s"
        )

    def close(self) -> None:
        """Ends the other processes."""
        # Without children the group is another's.
        if self.children:
            leave()
        for child in self.children.values():
            child.kill()
            child.wait()
        if self.replies is not None:
            # It sees them end; later it might meddle with those that come next.
            self.replies.complete(_GRACE_S)
        for connection in self.children:
            connection.close()
        self.children = {}
        self.replies = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Replies:
    """The answers of the other ranks to one command, taken while this one is at work on its own
    part."""

    def __init__(self, children: Mapping[Connection, subprocess.Popen[bytes]], abort: bool) -> None:
        """With `abort`, a rank that is lost ends the calls that wait for it, which NCCL does not
        notice; gloo does."""
        self.children = dict(children)
        self.abort = abort
        self.by_rank: dict[int, Reply] = {}
        self.trouble = threading.Event()
        self.thread = threading.Thread(target=self._take, daemon=True)

    def ask(self, command: str, argument: Any) -> None:
        """Sends the command to all."""
        self.thread.start()
        for connection in self.children:
            with suppress(OSError):  # it is gone, and the thread says so
                connection.send((command, argument))

    def _take(self) -> None:
        waiting = {connection: rank for rank, connection in enumerate(self.children, 1)}
        while waiting:
            try:
                ready = wait(list(waiting))
            except OSError:
                return  # closed by us
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    reply = connection.recv()
                except (EOFError, OSError):
                    reply = Reply(broke=f"it was ended {_how(self.children[connection])}")
                except Exception as error:
                    reply = Reply(broke=f"its answer cannot be read: {error}")
                self.by_rank[rank] = reply
                if reply.broke is not None:
                    self.trouble.set()
                    if self.abort:
                        leave()

    def complete(self, timeout_s: float) -> bool:
        """Whether all have answered, at the latest in so many seconds."""
        self.thread.join(timeout_s)
        return not self.thread.is_alive()

    def values(self) -> dict[int, bytes]:
        """What the ranks answered, by rank, where that is something."""
        values = {}
        for rank, reply in self.by_rank.items():
            if reply.value is not None:
                values[rank] = reply.value
        return values

    def lost(self) -> LostProcess | None:
        """Names the rank that broke, if one did, and not one that only missed another."""
        if not self.trouble.is_set():
            return None
        broken = {}
        for rank, reply in sorted(self.by_rank.items()):
            if reply.broke is not None:
                broken[rank] = reply.broke
        alone = [rank for rank, why in broken.items() if "gloo" not in why and "NCCL" not in why]
        rank = min(alone or broken)
        return LostProcess(
            f"process {rank} of the {len(self.children) + 1} of a training is lost: {broken[rank]}"
        )


def _how(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return "and cannot be reached"
    if code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


class LedTraining(Training):
    """Rank 0's part of a training, which leads the other ranks through theirs.

    What is not an epoch happens here alone, while the others wait: compaction, refit, one-shot
    pruning, measures, checkpoints.
    """

    def __init__(self, candidate: Candidate, team: Team) -> None:
        """Raises as `Team.training`."""
        self.team = team
        with team.along("begin", candidate.model_dump(mode="json")):
            super().__init__(candidate, team.devices[0], Group(0, team.size, team.devices[0]))

    def run_epoch(self) -> dict[str, Number]:
        """As `Training`, on all ranks; raises LostProcess besides."""
        with self.team.along("run_epoch", packed({"shuffler": self.shuffler.get_state()})):
            return super().run_epoch()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Training`; of a training on any number of processes."""
        with self.team.along("load", packed(state)):
            super().load_state_dict(state)

    def states(self) -> list[dict[str, Any]]:
        """The state of training of every rank."""
        with self.team.along("state") as others:
            own = self.state_dict()
        states = [own]
        for rank in range(1, self.team.size):
            states.append(unpacked(others[rank], self.device))
        return states
