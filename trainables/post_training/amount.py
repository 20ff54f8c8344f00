"""How much of a network goes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from slimfront.trainables.errors import UserError, shorten
from slimfront.trainables.options import suggest

Kind = Literal["channels", "weights", "layers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EXAMPLES = "channels=0.5, weights=0.9, layers=2"


@dataclass(frozen=True)
class Amount:
    """A share of the channels or of the weights, more than 0 and less than 1, or a number of
    layers."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        right = self._is_number() and self._is_in_range()
        if right:
            return
        if self.kind == "layers":
            raise UserError(f"{self}: it is how many layers go, 1 or more")
        raise UserError(f"{self}: it is a share, more than 0 and less than 1")

    def _is_number(self) -> bool:
        value: object = self.value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(self.value)

    def _is_in_range(self) -> bool:
        if self.kind == "layers":
            return not self.value < 1 and self.value == int(self.value)
        return 0 < self.value < 1

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    @classmethod
    def chosen(cls, given: Mapping[Kind, float | None]) -> "Amount":
        """The one that is not None.

        Raises:
            UserError: if there is none, or more than one, or it is out of range.
        """
        chosen = [cls(kind, value) for kind, value in given.items() if value is not None]
        if not chosen:
            raise UserError(f"prune: say what goes: one of {EXAMPLES}")
        if len(chosen) > 1:
            shown = ", ".join(map(str, chosen))
            raise UserError(
                f"prune: one of channels, weights and layers can be given, and there are {shown}"
            )
        return chosen[0]

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """What a text like `channels=0.5` says.

        Raises:
            UserError: if it says something else.
        """
        kind, equals, value = text.partition("=")
        shown = f"--prune {shorten(text)}"
        if not equals:
            raise UserError(f"{shown}: it needs a form such as {EXAMPLES}")
        for known in KINDS:
            if kind == known:
                try:
                    number = float(value)
                except ValueError:
                    raise UserError(
                        f"{shown}: '{shorten(value)}' is no number; it needs a form such as "
                        f"{EXAMPLES}"
                    ) from None
                is_whole = math.isfinite(number) and number == int(number)
                return cls(known, int(number) if is_whole else number)
        raise UserError(f"{shown}: there is no '{shorten(kind)}' to prune; {suggest(kind, KINDS)}")
