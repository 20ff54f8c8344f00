"""Two networks that run side by side, layer by layer."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WAITED_S = 0.5
"""So often who waits looks whether there is anything to wait for."""


@contextmanager
def outputs_of(network: nn.Module, inputs: Tensor, names: Iterable[str]) -> Iterator["Outputs"]:
    """Runs a network in a thread of its own that waits at each of these layers until what it gives
    was taken, so that no more of it is in memory than that."""
    outputs = Outputs(network, inputs, set(names))
    try:
        yield outputs
    finally:
        outputs.end()


class Outputs:
    """What the layers of a network give, one after another."""

    def __init__(self, network: nn.Module, inputs: Tensor, names: set[str]) -> None:
        self.given: queue.Queue[tuple[str, Tensor] | None] = queue.Queue(maxsize=1)
        self.ended = threading.Event()
        self.handles = []
        for name, module in network.named_modules():
            if name in names:
                handle = module.register_forward_hook(self._hook(name))
                self.handles.append(handle)
        self.thread = threading.Thread(target=self._run, args=(network, inputs), daemon=True)
        self.thread.start()

    def of(self, name: str) -> Tensor | None:
        """What the layer of that name gives; None if it comes no more. Layers before it are passed
        over."""
        while (found := self._next()) is not None:
            if found[0] == name:
                return found[1]
        return None

    def end(self) -> None:
        """Ends the other run, wherever it is."""
        self.ended.set()
        self.thread.join()
        for handle in self.handles:
            handle.remove()

    def _next(self) -> tuple[str, Tensor] | None:
        while True:
            try:
                return self.given.get(timeout=_WAITED_S)
            except queue.Empty:
                if not self.thread.is_alive():
                    return None

    def _run(self, network: nn.Module, inputs: Tensor) -> None:
        try:
            with torch.no_grad():
                network(inputs)
        except _Ended:
            return
        finally:
            self._put(None)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _given: Any, made: Tensor) -> None:
            self._put((name, made.clone()))  # which may be changed in place then
            if self.ended.is_set():
                raise _Ended

        return hook

    def _put(self, what: tuple[str, Tensor] | None) -> None:
        while not self.ended.is_set():
            try:
                self.given.put(what, timeout=_WAITED_S)
                return
            except queue.Full:
                continue


class _Ended(BaseException):
    """Nobody listens any more. No Exception, which a network's code may catch."""
