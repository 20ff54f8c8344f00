"""A task of the user's, by import path."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from slimfront.trainables.errors import OF_USERS_CODE, UserError, first_line
from slimfront.trainables.importing import import_by_path
from slimfront.trainables.tasks.base import TASKS, FunctionOptions, Task
from slimfront.trainables.tasks.metrics import Described, MetricOptions


@TASKS.register("factory")
class TaskFactory(Task):
    """The task that the callable at the import path `factory` makes of the keyword arguments
    `args`: a subclass of `slimfront.Task`, or a function that returns one.

    `metrics`, `loss` and `output` go to it where they are given; names of metrics and losses are
    those of its class.
    """

    name: Literal["factory"] = "factory"
    factory: str
    args: dict[str, JsonValue] = Field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.factory, frozenset(self.args), self.output))

    @classmethod
    def check_metrics(cls, metrics: Sequence[MetricOptions]) -> None:
        """Names are those of the class at the import path: `resolve` checks them."""

    @classmethod
    def check_loss(cls, loss: str | FunctionOptions) -> None:
        """The same."""

    def resolve(self) -> Task:
        made = import_by_path(self.factory, "task factory")
        try:
            task = made(**copy.deepcopy(self.args))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise UserError(f"task factory '{self.factory}': {first['msg']}") from None
        except OF_USERS_CODE as error:
            raise UserError(
                f"task factory '{self.factory}' raised {type(error).__name__}: {first_line(error)}"
            ) from error
        if not isinstance(task, Task):
            kind = made.__name__ if inspect.isclass(made) else type(task).__name__
            raise UserError(
                f"task factory '{self.factory}' gives a {kind}; it must be a subclass of "
                "slimfront.Task"
            )
        given: dict[str, Any] = {}
        for key in ("metrics", "loss", "output"):
            value = getattr(self, key)
            if value:
                given[key] = value
        task = task.model_copy(update=given)
        try:
            task.check_metrics(task.chosen_metrics())
            task.check_loss(task.loss)
            task.described()
        except ValueError as error:
            raise UserError(f"task factory '{self.factory}': {error}") from None
        except KeyError as error:
            raise UserError(
                f"task factory '{self.factory}': DEFAULT names {error}, which is not in KNOWN, and "
                "'describe' and 'metric' of the class do not know it; known: "
                f"{', '.join(task.KNOWN) or 'none'}"
            ) from None
        if not task.chosen_metrics():
            raise UserError(
                f"task factory '{self.factory}' gives a task that names no metric, by which "
                "networks are judged; set task.metrics, or DEFAULT of the class"
            )
        return task

    def described(self) -> tuple[Described, ...]:
        return self.resolve().described()
