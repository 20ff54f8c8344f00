"""Reads and writes the YAML of configs, within bounds: a file may be a device, and text may be made
to do harm."""

import math
import os
import re
import stat
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimfront.trainables.errors import UserError, shorten


@dataclass(frozen=True)
class Limits:
    """What a config may have at most; the longest that we ship has 2 kB and 90 values.

    `size` counts bytes of the file. `values` counts keys, lists and mappings too, and an alias as
    all that it stands for. `levels` of nesting also bound the parts of a dotted path. `characters`
    are those of one value, `key` those of one key.
    """

    size: int = 200_000
    values: int = 10_000
    levels: int = 32
    characters: int = 10_000
    key: int = 300


GIVEN = Limits()
RECORDED = Limits(size=4_000_000, values=40_000, levels=64)
"""For a config that was taken once and written out again with all defaults: it is longer, and must
never be refused."""


def read_text(path: Path, limits: Limits = GIVEN) -> str:
    """The text of a config file.

    Raises:
        UserError: if it is no regular file (a pipe would be waited for, and a device has no end),
            is too large, or is no text.
    """
    try:
        content = _read_regular(path, limits.size)
        return content.decode("utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    raise UserError(f"cannot read the config {path}: {reason}")


def _read_regular(path: Path, size: int) -> bytes:
    # Without waiting: the path may have become a pipe since anyone looked.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(0, "Is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(0, "it is not a regular file; copy what it holds into one")
        content = file.read(size + 1)
    if len(content) > size:
        raise OSError(0, f"it has more than {size:,} bytes, which no config needs")
    return content


def parse(text: str, where: str, limits: Limits = GIVEN) -> Any:
    """The plain data of a YAML text: mappings, lists, text, numbers, true and false, and null.

    Raises:
        UserError: if it is not YAML, or not within `limits`; `where` begins the sentence.
    """
    if len(text) > limits.size:
        raise UserError(
            f"{where}: it has more than {limits.size:,} characters, which no config needs"
        )
    line = ""
    try:
        # Inside, since the reader refuses characters as soon as it is made.
        loader = _Loader(text, limits)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = ""
        if mark:
            line = f", line {mark.line + 1}"
        problem = (
            getattr(error, "problem", None)
            or getattr(error, "reason", None)
            or str(error).partition("\n")[0]
        )
        reason = str(problem) if isinstance(error, _Refused) else f"this is not YAML: {problem}"
    raise UserError(f"{where}{line}: {reason}")


def write(tree: dict[str, Any]) -> str:
    """Plain data as YAML that `parse` reads back as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_value(value: object) -> str:
    """A value on one line of YAML, which `parse` reads back as it was.

    Raises:
        TypeError: if it holds something else than plain data.
    """
    try:
        listed = yaml.dump(
            [value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf
        )
    except yaml.representer.RepresenterError:
        raise TypeError(type(value).__name__) from None
    return listed.strip()[1:-1]


class _Refused(yaml.MarkedYAMLError):
    """YAML that is none of a config's."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


_PREFIX = "tag:yaml.org,2002:"
_KINDS = {
    f"{_PREFIX}{name}": kind
    for name, kind in (
        ("str", "text"),
        ("int", "a whole number"),
        ("float", "a number"),
        ("bool", "true or false"),
        ("null", "null"),
        ("map", "a mapping"),
        ("seq", "a list"),
    )
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters: 1e-3 is a number, a date is text, the keys `on`, `off`, `yes` and
    `no` are text, and a key may not stand twice.

    Bounds are checked while the text is read, and not on what it became: by then an alias bomb has
    gone off.
    """

    def __init__(self, text: str, limits: Limits) -> None:
        super().__init__(text)
        self.limits = limits
        self.values = self.level = 0
        self.unfinished: set[str] = set()
        self.sizes: dict[str, int] = {}
        """How many values an alias stands for, by its name."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML; the text is refused where it leaves the bounds."""
        event = self.peek_event()
        before = self.values
        name = event.anchor
        self.values += 1 if not isinstance(event, yaml.AliasEvent) else self.sizes.get(name, 1)
        if self.values > self.limits.values:
            raise _Refused(
                f"it has more than {self.limits.values:,} values, which no config needs",
                event.start_mark,
            )
        if isinstance(event, yaml.AliasEvent):
            if name in self.unfinished:
                raise _Refused(
                    f"the alias '*{name}' stands inside of what it names", event.start_mark
                )
            return super().compose_node(parent, index)
        if self.level >= self.limits.levels:
            raise _Refused(
                f"it is nested in more than {self.limits.levels} levels", event.start_mark
            )
        if isinstance(event, yaml.ScalarEvent):
            self._check_text(event.value, event.start_mark)
        self.level += 1
        if name:
            self.unfinished.add(name)
        node = super().compose_node(parent, index)
        self.level -= 1
        if name:
            self.unfinished.discard(name)
            self.sizes[name] = self.values - before
        return node

    def _check_text(self, text: str, mark: Any) -> None:
        if len(text) > self.limits.characters:
            raise _Refused(f"a value has more than {self.limits.characters:,} characters", mark)
        if re.search("[\ud800-\udfff]", text):
            raise _Refused("a value has half of a character (a lone surrogate)", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML; what a tag or its value cannot be is refused, whatever PyYAML raises there."""
        if node.tag not in _KINDS:
            kind = "this is"
            if isinstance(node.value, str):
                kind = f"'{shorten(node.value)}' is"
            raise _Refused(
                f"{kind} of the kind '{shorten(node.tag)}', which a config cannot have",
                node.start_mark,
            )
        try:
            made = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:
            value = "this"
            if isinstance(node.value, str):
                value = f"'{shorten(node.value)}'"
            raise _Refused(
                f"{value} is not {_KINDS[node.tag]}, or one too large", node.start_mark
            ) from None
        if isinstance(made, int) and abs(made) >= 2**63:
            raise _Refused(
                f"the whole number {shorten(node.value)} is too large; it must be below 2^63",
                node.start_mark,
            )
        return made

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML; a key is plain, not too long, and stands once; `on` and `no` are text."""
        if not isinstance(node, yaml.MappingNode):  # of a tag that was written by hand
            raise _Refused("this is not a mapping", node.start_mark)
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_PREFIX}bool" and isinstance(key_node.value, str):
                key_node.tag = f"{_PREFIX}str"  # `on: onnx`, which YAML 1.1 reads as true
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _Refused(
                    "a key is a list or a mapping, and must be text", key_node.start_mark
                )
            if len(str(key)) > self.limits.key:
                raise _Refused(
                    f"a key has more than {self.limits.key} characters", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes text that the loader would take for a number in quotes, and what stands twice
    twice."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML calls it so)
        """Always: what a file says once for two places may be changed in one of them later."""
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_PREFIX}timestamp"]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        f"{_PREFIX}float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
        list("-+0123456789."),
    )
