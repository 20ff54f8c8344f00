"""Networks for trainings on several processes."""

import os
import signal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimfront.trainables.models.resnet import BasicBlock


class Doubled(nn.Module):
    """A network of the digits in float64, where rounding does not decide; every penalty and
    sparsifier finds something in it.

    Pixels that are blank in all images get values of their own: their gradients would be equal, and
    rounding decide which grow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.second, self.middle = (
            nn.Linear(n, 16) for n in (64, 16, 16, 16)
        )
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))
        self.last = nn.Linear(16, 10)
        self.register_buffer("gains", torch.linspace(0.9, 1.1, 64))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64) to (N, 10)."""
        x = self.relus[0](self.first(torch.flatten(x.double(), 1) * self.gains))
        x = self.relus[2](x + self.second(self.relus[1](self.inner(x))))
        out: Tensor = self.last(self.relus[3](self.middle(x)))
        return out


class LeavesOut(Doubled):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16).double()


def noisy() -> nn.Module:
    """Batch norms, dropout and a residual block, for images (N, 3, 8, 8) of three classes."""
    convolutions = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8, 1),
        BasicBlock(8, 8, 1),
    ]
    head = [
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
    ]
    return nn.Sequential(*convolutions, *head, nn.Linear(16, 3))


class Troubled(Doubled):
    """In training, on one rank only, and on more than `most` examples: `raises`, runs out of
    `memory`, or is `killed`."""

    def __init__(self, trouble: str, rank: int, most: int = 40) -> None:
        super().__init__()
        self.trouble, self.rank, self.most = trouble, rank, most

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64) to (N, 10)."""
        if (
            self.training
            and len(x) > self.most
            and dist.is_initialized()
            and dist.get_rank() == self.rank
        ):
            if self.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (
                torch.OutOfMemoryError("out of memory")
                if self.trouble == "memory"
                else ValueError("the network is moody")
            )
        return super().forward(x)


class Drifting(Doubled):
    """Computes something else on each rank, as devices that round differently do; much more than
    they."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64) to (N, 10)."""
        noise = torch.randn(
            64, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64
        )
        return super().forward(x.flatten(1) + noise.to(x.device))
