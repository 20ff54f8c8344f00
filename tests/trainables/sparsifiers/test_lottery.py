import pytest
import torch

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers import LotteryTicket
from tests.trainables.sparsifiers.made import attach, network, train


def test_after_each_round_the_kept_weights_are_the_initial_ones_and_the_largest_were_kept() -> None:
    active = attach(LotteryTicket(sparsity=0.875, rounds=3))
    start = network().state_dict()
    shares = []
    for number in range(3):
        train(active, (10 * number, 10 * number + 9))
        trained = {name: weight.detach().abs().clone() for name, weight in active.weights.items()}
        train(active, (10 * number + 9, 10 * number + 10))
        for name, value in active.setting.model.state_dict().items():
            assert torch.equal(
                value, start[name] * active.masks[name] if name in active.masks else start[name]
            )
        assert not active.setting.optimizer.state
        kept = torch.cat([trained[name][mask] for name, mask in active.masks.items()])
        assert kept.mean() > torch.cat([t.flatten() for t in trained.values()]).mean()
        shares.append(
            sum(int(mask.sum()) for mask in active.masks.values())
            / sum(m.numel() for m in active.masks.values())
        )
    assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 8], abs=1e-3)  # equal factors
    train(active, (30, 40))
    assert not torch.equal(active.setting.model.state_dict()["0.bias"], start["0.bias"])


def test_late_rewinding_goes_back_to_the_weights_of_that_step() -> None:
    active = attach(LotteryTicket(sparsity=0.75, rounds=1, rewind=0.25))
    train(active, (0, 5))
    ticket = {name: value.clone() for name, value in active.setting.model.state_dict().items()}
    train(active, (5, 20))
    for name, value in active.setting.model.state_dict().items():
        assert torch.equal(
            value, ticket[name] * active.masks[name] if name in active.masks else ticket[name]
        )
    assert active.progress(20) == pytest.approx(0.25)
    assert active.progress(30) == pytest.approx(0.625)
    assert active.progress(40) == 1


def test_the_learning_rate_starts_anew_in_each_round_and_the_last_takes_the_rest() -> None:
    active = attach(LotteryTicket(sparsity=0.5, rounds=2), steps=41)
    assert [active.progress(step) for step in (0, 12, 13, 25, 26, 41)] == pytest.approx(
        [0, 12 / 13, 0, 12 / 13, 0, 1]
    )


def test_more_rounds_than_steps_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"sparsifier\.rounds \(5\) needs 6 trainings, and there are only 4 steps"
    ):
        attach(LotteryTicket(sparsity=0.5, rounds=5), steps=4)
