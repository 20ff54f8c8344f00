import torch

from slimfront.trainables.models import MLP
from slimfront.trainables.penalties.connection import ConnectionSparsity, soft_threshold


def test_the_proximal_step_is_the_soft_threshold_to_the_bit_and_leaves_biases() -> None:
    torch.manual_seed(0)
    model = MLP(depth=2, width=16).build((1, 8, 8), 10)
    with torch.no_grad():
        model[1].weight[0, :3] = torch.tensor([torch.nan, torch.inf, 0.0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = ConnectionSparsity(strength=0.3, layers={"3": 2.0})
    penalty.attach(model, torch.zeros(1, 1, 8, 8)).proximal(0.1)
    for name, now in model.named_parameters():
        threshold = 0.1 * (2.0 if name == "3.weight" else 0.3)
        wanted = (
            soft_threshold(before[name], torch.tensor(threshold))
            if name.endswith("weight")
            else before[name]
        )
        assert torch.equal(now.nan_to_num(7.0), wanted.nan_to_num(7.0))
