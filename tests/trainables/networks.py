"""Networks that are not ours, for tests."""

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """An addition, a concatenation, a depthwise and a grouped convolution, and batch norms before and after additions."""

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
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
                module.weight.normal_()
                module.bias.normal_()
