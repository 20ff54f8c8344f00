"""Training functions as users write them; by import path."""

import sys

import torch

import slimfront as sf


def train(trial: sf.Trial, lr: float = 3e-3, stop_after: int | None = None) -> None:
    """An average of the weights is what ships; resumes bit-exactly."""
    network = trial.network
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr)
    slim = trial.slimming(optimizer, steps=trial.epochs * trial.steps_per_epoch)
    if trial.resume_state is not None:
        optimizer.load_state_dict(trial.resume_state["optimizer"])
        average.load_state_dict(trial.resume_state["average"])
        torch.set_rng_state(trial.resume_state["rng"])
    for epoch in trial.epochs_to_come:
        network.train()
        for inputs, targets in trial.batches():
            loss = trial.loss(network(inputs), targets) + slim.loss()
            optimizer.zero_grad()
            loss.backward()
            slim.before_step()
            optimizer.step()
            slim.after_step()
            average.update_parameters(network)
        slim.apply_to(average)
        state = {
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict(),
            "rng": torch.get_rng_state(),
        }
        trial.report(
            epoch, state=state, network=average.module, train_loss=float(loss), **trial.evaluate()
        )
        if epoch == stop_after:
            return


def without_slimming(trial: sf.Trial) -> None:
    trial.report(1)


def silent(trial: sf.Trial) -> None:
    del trial


def raises(trial: sf.Trial) -> None:
    raise ZeroDivisionError("no batches")


def never_steps(trial: sf.Trial) -> None:
    optimizer = torch.optim.Adam(trial.network.parameters())
    trial.slimming(optimizer, steps=10)
    trial.report(1)


def counts_steps(trial: sf.Trial) -> None:
    trial.report(1001)


def reports_a_loss_first(trial: sf.Trial) -> None:
    trial.report(1.5)  # type: ignore[arg-type]


def backwards(trial: sf.Trial) -> None:
    trial.report(2)
    trial.report(1)


def diverges(trial: sf.Trial) -> None:
    trial.report(1, train_loss=float("nan"))


def not_plain(trial: sf.Trial) -> None:
    trial.report(1, state={"f": lambda: None})


ENDED: list[str] = []


def cleans_up(trial: sf.Trial) -> None:
    try:
        for epoch in trial.epochs_to_come:
            trial.report(epoch)
    except Exception:  # must not see that the search stops the trial
        ENDED.append("seen")
    finally:
        ENDED.append("cleaned up")


def whole_average(trial: sf.Trial) -> None:
    """Reports the average as torch wraps it."""
    average = torch.optim.swa_utils.AveragedModel(trial.network)
    for epoch in trial.epochs_to_come:
        trial.report(epoch, network=average)


def leaves(trial: sf.Trial, code: int) -> None:
    trial.report(1)
    sys.exit(code)


def says_words(trial: sf.Trial) -> None:
    trial.report(1, note="hello")
