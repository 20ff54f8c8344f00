"""Typed options, registries that find them by the name in a config, and what is wrong with options
in one sentence: where, what, and what would be right."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from slimfront.trainables.errors import UserError, shorten
from slimfront.trainables.redaction import redact

_LONGEST_WORD = 100
"""Of longer words only the beginning is compared: the comparison takes time, and nothing that is
known is so long."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Ends a message about an unknown `word`: the nearest known one if there is one, else all of
    them."""
    choices = sorted(known)
    near = difflib.get_close_matches(word[:_LONGEST_WORD], choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(choices) or 'none'}"


def _is_number(field: FieldInfo) -> bool:
    """Whether a number fits a field, and true and false do not."""
    kinds: set[object] = {field.annotation, *get_args(field.annotation)}
    of_literals = [value for kind in kinds for value in get_args(kind)]
    if bool in kinds or any(isinstance(value, bool) for value in of_literals):
        return False
    return not kinds.isdisjoint((int, float))


class Options(BaseModel):
    """Base of every part of a config: immutable, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    hint = suggest(str(key), cls.model_fields)
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key '{key}'; {hint}",
                        {"key": str(key), "hint": hint},
                    )
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _is_number(cls.model_fields[str(info.field_name)]):
            raise ValueError(f"it should be a number, and it is {str(value).lower()}")
        return value

    def range_of(self, name: str) -> dict[str, float | bool] | None:  # noqa: ARG002
        """The range that a search tries for one of these options where it is left to them, as
        `space` has it: `low`, `high` and `log`; None if they have none for it.

        Raises ValueError, with what would be right, if it depends on another option.
        """
        return None


@cache
def _with_factory(what: str, path: str, base: type[Options]) -> type[Options]:
    """The class at an import path, which remembers that path: in another process, it is found there
    again."""
    # Imported late: it is above this module.
    from slimfront.trainables.importing import import_by_path

    made = import_by_path(path, f"{what} factory")
    if not inspect.isclass(made) or not issubclass(made, base):
        from slimfront.trainables.errors import UserError

        raise UserError(
            f"{what} factory '{path}': it is no class of the kind; a {what} of your own is a "
            f"subclass of slimfront.{base.__name__}"
        )
    fields: dict[str, Any] = {"factory": (str, path)}
    if "name" in made.model_fields:
        fields["name"] = (str, path)
    return create_model(made.__name__, __base__=made, **fields)


OptionsT = TypeVar("OptionsT", bound=Options)


class Registry(dict[str, type[OptionsT]]):
    """Types of options by the name that a config calls them: `name: mlp` finds `models["mlp"]`.

    Adding a model, data set, penalty or sparsifier is one file with one decorated class.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, *names: str) -> Callable[[type[OptionsT]], type[OptionsT]]:
        """Class decorator; one class may have several names. Raises ValueError if a name is
        taken."""

        def add(cls: type[OptionsT]) -> type[OptionsT]:
            for name in names:
                if name in self:
                    raise ValueError(
                        f"{self.what} '{name}' is registered twice: {self[name]} and {cls}"
                    )
                self[name] = cls
            return cls

        return add

    def find(self, name: Any) -> type[OptionsT]:
        """The options class called `name`. Raises PydanticCustomError, with a suggestion, if there
        is none."""
        if not isinstance(name, str) or name not in self:
            hint = suggest(str(name), self)
            raise PydanticCustomError(
                "unknown_name",
                "unknown {what} '{name}'; {hint}",
                {"what": self.what, "name": str(name), "hint": hint},
            )
        return self[name]

    def parse_named(self, value: Any) -> Any:
        """`{name: mlp, depth: 4}` or just `mlp`, to the options of that name; other values pass
        through."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        if "factory" in value and "factory" not in self:
            return self.from_factory(value)
        if "name" not in value and "factory" in value:
            value = {"name": "factory", **value}
        if "name" not in value:
            raise PydanticCustomError(
                "no_name",
                "the {what} has no 'name'; known: {known}",
                {"what": self.what, "known": ", ".join(sorted(self))},
            )
        cls = self.find(value["name"])
        for key in value:
            owners = sorted(name for name, other in self.items() if key in other.model_fields)
            if key not in cls.model_fields and owners:
                raise PydanticCustomError(
                    "not_an_option",
                    "'{key}' is not an option of the {what} '{name}', only of {owners}; '{name}' "
                    "has: {known}",
                    {
                        "key": key,
                        "what": self.what,
                        "name": value["name"],
                        "owners": ", ".join(owners),
                        "known": ", ".join(sorted(cls.model_fields)),
                    },
                )
        return cls.model_validate(value)

    def from_factory(self, value: Mapping[str, Any]) -> OptionsT:
        """Options of the class at the import path `factory`, with the other keys.

        Raises:
            UserError: if there is none, or it is no class of this kind.
        """
        path = value["factory"]
        return _with_factory(self.what, str(path), self.base()).model_validate(value)  # type: ignore[return-value]

    def base(self) -> type[Options]:
        """The class that all of this kind are subclasses of."""
        found: type[Options] = Options
        for cls in next(iter(self.values())).__mro__:
            if not issubclass(cls, Options) or cls is Options:
                break
            if all(issubclass(other, cls) for other in self.values()):
                found = cls
                break
        return found

    def parse_mapping(self, value: Any) -> Any:
        """`{layer: {strength: 1}, …}` to options by name; other values pass through."""
        if not isinstance(value, Mapping):
            return value
        parsed: dict[Any, Any] = {}
        for name, options in value.items():
            if isinstance(options, Options):
                parsed[name] = options
                continue
            own = isinstance(options, Mapping) and "factory" in options
            try:
                if own:
                    parsed[name] = self.from_factory(options)
                    continue
                cls = self.find(name)
                parsed[name] = cls.model_validate({} if options is None else options)
            except ValidationError as error:
                lines = [
                    InitErrorDetails(
                        type=PydanticCustomError(
                            e["type"], e["msg"].replace("{", "{{").replace("}", "}}")
                        ),
                        loc=(name, *e["loc"]),
                        input=e["input"],
                    )
                    for e in error.errors()
                ]
                raise ValidationError.from_exception_data(self.what, lines) from None
        return parsed


def validated(kind: type[OptionsT], given: Mapping[str, Any], what: str) -> OptionsT:
    """Options from a mapping. Raises UserError, which begins with `what` was called, if one is
    unknown or out of range."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError(f"{what}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first problem, and how many more there are."""
    first = explain_first(error)
    more = error.error_count() - 1
    if more:
        return f"{first} (and {more} more)"
    return first


def explain_first(error: ValidationError | KeyError, inside: str = "") -> str:
    """The first problem as a clause: where, what, and what would be right. Where is left out if it
    is `inside`."""
    if isinstance(error, KeyError):
        return str(error.args[0])
    first = error.errors(include_url=False)[0]
    where = _location(first)
    if first["type"] == "missing":
        return f"'{shorten(where)}' is missing"
    message = _message(first)
    if where in ("", inside) or first["type"] == "space":
        return message
    where = f"'{shorten(where, 100)}'"
    if first["type"].startswith("unknown_"):
        return f"in {where}: {message}"
    return f"{where}: {message}"


def _location(problem: ErrorDetails) -> str:
    """The dotted path of the value, without what pydantic adds for a union."""
    parts = [str(part) for part in problem["loc"]]
    last = parts[-1] if parts else ""
    of_union = last in _UNION_TAGS or last.startswith(("literal[", "constrained-"))
    if len(parts) > 1 and of_union:
        parts.pop()
    return ".".join(parts)


def _message(problem: ErrorDetails) -> str:
    """What is wrong, in the words of a config, without secrets and without long values."""
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("valid dictionary", "mapping of keys to values")
    message = re.sub(r" or instance of \w+", "", message)
    message = redact(message[:1].lower() + message[1:])
    got = problem["input"]
    if isinstance(got, str):
        short = shorten(got)
        if short != got:
            message = message.replace(repr(got), repr(short)).replace(got, short)
    if problem["type"] in _COMPLETE:
        return message
    message = re.sub("^input should", "it should", message)
    if isinstance(got, str | int | float | bool | None):
        return f"{message}, and it is {shorten(repr(got))}"
    return message


_UNION_TAGS = ("int", "float", "bool", "str")
"""What pydantic adds to the location of a value that fits no member of a union."""

_COMPLETE = ("unknown_key", "unknown_name", "no_name", "space", "value_error")
"""Our own messages, which name the value where that helps."""
