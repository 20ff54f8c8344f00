"""Syne Tune's MOASHA, multi-objective asynchronous successive halving, as a process that is asked a
line at a time: each line is a JSON list, and so is each answer.

- `["suggest", number]`: the values of a new trial, by path;
- `["result", number, results]`: whether the trial goes on, `CONTINUE` or `STOP`.
"""

import json
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, lograndint, loguniform, randint, uniform
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA


def space(described: list[dict[str, Any]]) -> dict[str, Any]:
    """The space of a search: what each value is drawn from, by path."""
    found: dict[str, Any] = {}
    for one in described:
        if one["choices"] is not None:
            found[one["path"]] = choice(one["choices"])
            continue
        draw = {
            (True, True): lograndint,
            (True, False): randint,
            (False, True): loguniform,
            (False, False): uniform,
        }[one["whole"], one["log"]]
        found[one["path"]] = draw(one["low"], one["high"])
    return found


def main() -> None:
    """Gets the settings as JSON: `seed`, `space`, `metrics`, which are minimised, `most` epochs of
    a trial, and the first rung, `grace`."""
    settings = json.loads(sys.argv[1])
    np.random.seed(settings["seed"])  # what Syne Tune draws from
    scheduler = MOASHA(
        space(settings["space"]),
        settings["metrics"],
        time_attr="epoch",
        max_t=settings["most"],
        grace_period=settings["grace"],
        random_seed=settings["seed"],
    )
    trials: dict[int, Trial] = {}
    for line in sys.stdin:
        asked, number, *rest = json.loads(line)
        if asked == "suggest":
            values = scheduler.suggest().config
            trials[number] = Trial(number, values, datetime.now(UTC))
            scheduler.on_trial_add(trials[number])
            answer: Any = {path: _plain(value) for path, value in values.items()}
        else:
            answer = scheduler.on_trial_result(trials[number], rest[0])
        print(json.dumps(answer), flush=True)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


if __name__ == "__main__":
    main()
