"""Values of a config that `--set` replaces."""

from collections.abc import Mapping, Sequence
from typing import Any

from slimfront.search.config.space import Tree, set_path
from slimfront.search.config.yaml_files import Limits, parse, write_value
from slimfront.trainables.errors import UserError, shorten

Overrides = Mapping[str, Any] | Sequence[str] | str
"""Values by dotted path, or texts `dotted.path=value`."""


def as_texts(overrides: Overrides) -> list[str]:
    """Overrides as `overridden` takes them.

    Raises:
        UserError: if a path is no text, or a value is nothing that a config can hold.
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    texts = []
    for path, value in overrides.items():
        if not isinstance(path, str):
            raise UserError(
                f"overrides: a path is text, such as 'training.epochs', and {shorten(path)} is none"
            )
        try:
            texts.append(f"{path}={write_value(value)}")
        except TypeError:
            raise UserError(
                f"overrides '{shorten(path)}': it is a {type(value).__name__}, and a config holds "
                "numbers, text, true or false, lists and mappings"
            ) from None
    return texts


def overridden(tree: Tree, overrides: Sequence[str], limits: Limits) -> dict[str, Any]:
    """A config's tree with overrides put in.

    Args:
        overrides: `dotted.path=value` each, the value as YAML.

    Raises:
        UserError: if one has another form, or its path leads through something without parts.
    """
    tree = dict(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        shown = f"--set {shorten(override, 100)}"
        if not equals or not key:
            raise UserError(f"{shown}: it needs the form path=value, such as training.epochs=5")
        too_long = len(key) > limits.key
        too_deep = key.count(".") >= limits.levels
        if too_long or too_deep:
            raise UserError(
                f"{shown}: a path has at most {limits.key} characters and {limits.levels} parts"
            )
        try:
            meant = parse(value, shown, limits)
            tree = _override(tree, key, meant)
        except KeyError as error:
            problem = error.args[0]
            raise UserError(f"{shown}: {problem}") from None
    return tree


def _override(tree: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """`set_path`, where what follows `space.` is first looked for among the paths that the space
    already has."""
    space = tree.get("space")
    in_space = key.startswith("space.")
    if not in_space or not isinstance(space, Mapping):
        return set_path(tree, key, value)
    path, inside = _path_of(space, key.removeprefix("space."))
    if inside is not None:
        parameter = space[path]
        if not isinstance(parameter, Mapping):
            shown = shorten(repr(parameter))
            raise KeyError(f"'space.{path}' is {shown}, which has no '{inside}'")
        value = set_path(parameter, inside, value)
    changed = {**space, path: value}
    return {**tree, "space": changed}


def _path_of(space: Tree, key: str) -> tuple[str, str | None]:
    """The path of the space that a key names, and what of its parameter, if a part."""
    for path in space:
        if key == path:
            return path, None
        inside = f"{path}."
        if key.startswith(inside):
            return path, key.removeprefix(inside)
    return key, None
