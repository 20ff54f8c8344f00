"""Networks that are not ours, for tests."""

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """An addition, a concatenation, a depthwise and a grouped convolution, and batch norms before
    and after additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.after = nn.BatchNorm2d(16)
        self.side = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 24, 3, padding=1, groups=4)
        self.last = nn.BatchNorm2d(24)
        self.depth_norm = nn.BatchNorm2d(32)
        self.side_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(24 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) to (N, 5)."""
        x = torch.relu(self.stem(x))
        x = self.after(x + self.norm(self.one(x))).relu()
        x = torch.cat([x, torch.relu(self.side_norm(self.side(x)))], dim=1)
        x = torch.relu(self.depth_norm(self.depthwise(x)))
        x = nn.functional.max_pool2d(torch.relu(self.last(self.grouped(x))), 4)
        out: Tensor = self.head(torch.flatten(x, 1))
        return out


def damage_batch_norms(model: nn.Module) -> None:
    """Statistics, scales and shifts of all signs."""
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                continue
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.normal_()
                module.bias.normal_()


class Block(nn.Module):
    """Attention and a perceptron, each added to what comes in."""

    def __init__(self, width: int, heads: int, *, batch_first: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=batch_first)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, width) to the same, or (L, N, width)."""
        normed = self.norm1(x)
        attended, _ = self.attention(normed, normed, normed, need_weights=False)
        x = x + attended
        out: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A classifier of 8×8 images by their rows, with a token for the class and an embedding of
    positions."""

    def __init__(self, width: int = 16, heads: int = 4, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(8, width)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 9, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, batch_first=batch_first) for _ in range(2))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = self.embed(x.flatten(1).view(-1, 8, 8))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.blocks(x) if self.batch_first else self.blocks(x.transpose(0, 1)).transpose(0, 1)
        out: Tensor = self.head(self.norm(x[:, 0]))
        return out


def asserted(h: Tensor) -> Tensor:
    """Images, of which something is asserted: pytest has other assertions in files of tests."""
    assert h.shape[-1] < 20
    assert h.shape[-2] != 11, f"{h.shape[-2]} is too much"
    assert h.isfinite().all()
    return h
