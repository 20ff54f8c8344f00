"""Draws configs that are broken in all the ways that files are, by accident or on purpose: the same
ones for the same seed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from slimfront.search.config.space import flatten, set_path

BASE: dict[str, Any] = {
    "name": "small",
    "data": {"name": "digits", "seed": 0},
    "model": {"name": "mlp", "depth": 2, "width": 16},
    "training": {
        "epochs": 2,
        "batch_size": 256,
        "lr": 0.01,
        "optimizer": "adam",
        "report_every": 1,
    },
    "penalties": {
        "layer": {"strength": 1.0, "warmup": 0},
        "cka": {"strength": 0.001, "samples": 8},
    },
    "sparsifier": {"name": "magnitude", "sparsity": 0.5},
    "compaction": {"merge": "always", "tolerance": 0.0001},
    "refit": {"epochs": 1},
    "latency": {"runs": 3},
    "objectives": ["val_accuracy", "nonzero_params"],
    "constraints": {"val_accuracy": ">= 0.5"},
    "search": {
        "trials": 4,
        "sampler": {"name": "tpe"},
        "time": "30m",
        "early_stopping": True,
        "storage_path": "runs",
    },
    "resources": {"cpu": 1, "memory": "1GB", "custom": {"big": 1}},
    "tracking": {"uri": "sqlite:///slimfront.db", "experiment": "e"},
}
SPACE: dict[str, Any] = {
    "penalties.layer.strength": {"low": 0.1, "high": 100.0, "log": True},
    "sparsifier.sparsity": {"low": 0.1, "high": 0.9},
    "model.depth": {"low": 1, "high": 4, "step": 1},
    "training.optimizer": {"choices": ["adam", "sgd"]},
}


@dataclass(frozen=True)
class Broken:
    """A config file and the overrides that it is checked with.

    `kind` says what was done to it. `file` is what the config is instead of a file with `content`:
    a pipe, a device, a link.
    """

    kind: str
    content: bytes
    overrides: tuple[str, ...] = ()
    file: str = ""


class _Raw(str):
    """Written into YAML as it is."""


def _yaml(value: Any) -> str:
    """As YAML on one line; text in double quotes, where any character can be written as an
    escape."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return (
            '"'
            + "".join(
                c if " " < c < "\x7f" and c not in '"\\' else f"\\U{ord(c):08x}" for c in value
            )
            + '"'
        )
    return (
        {None: "null", True: "true", False: "false"}.get(value, repr(value))
        if value in (None, 0, 1)
        else repr(value)
    )


_WORDS = (
    "",
    "x",
    "~nouser/x",
    "~/x",
    "c=[d]",
    "[/x]",
    "a\nb",
    "\x00",
    "\u202e\u2066",
    "é" * 30,
    "{key}",
    "%s{0}",
    "\ud800",
    "-" * 5,
)
_WORDS += (
    "2024-13-45",
    "1e400",
    "NaN",
    "0x",
    "1:99",
    "yes",
    "9" * 400 + "d",
    "9" * 400 + "GB",
    "1.5.5GB",
    "<= " + "9" * 400,
)
_WORDS += (
    "s3://k:s@b",
    "http://[",
    "sqlite:///",
    "../..",
    "/dev/zero",
    "val_accuracy",
    "tpe",
    "auto",
    "my:f",
    "A" * 5_000,
)
_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-300, 5e-324, 1.7e308, 10**18)
_FRAGMENTS = (
    "1" * 5_000,
    "-" + "9" * 20_000,
    "0x" + "f" * 9_000,
    "1e999999999",
    ".inf",
    "-.inf",
    ".nan",
    "1:" * 40 + "1",
    "2024-02-30",
)
_FRAGMENTS += (
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!null x",
    "!!timestamp x",
    "!!binary x",
    "!!map x",
    "!!seq x",
    "!!set {a}",
)
_FRAGMENTS += (
    "!!omap [a]",
    "!!pairs [a]",
    "!!python/object/apply:os.system [id]",
    "!x y",
    "!!str [a]",
    "*nowhere",
    "&a [*a]",
    "&b {c: *b}",
)
_FRAGMENTS += (
    "? [a]",
    "{? [a] : b}",
    "{<<: {a: 1}}",
    "{<<: 5}",
    "=",
    "<<",
    "'",
    '"\\x"',
    "@",
    "`",
    "%",
    "- - -",
    "|",
    "{a: 1, a: 2}",
    "2001-01-01",
)


def _value(random: Random) -> Any:
    """Something that a config does not expect."""
    # What YAML itself refuses is rarer: it would hide all else that is wrong with a config.
    return random.choices(_VALUES, (6, 8, 2, 3, 1, 1, 1))[0](random)


def _nested(random: Random) -> Any:
    depth = random.choice((3, 40, 400, 5_000))
    return (
        _Raw("[" * depth + "]" * depth)
        if random.random() < 0.5
        else _Raw("{a: " * depth + "1" + "}" * depth)
    )


_VALUES: tuple[Callable[[Random], Any], ...] = (
    lambda random: random.choice(_WORDS),
    lambda random: random.choice(_NUMBERS),
    lambda random: _Raw(random.choice(_FRAGMENTS)),
    lambda random: random.choice(
        (None, True, [], {}, [[]], {"a": {}}, [None], {"name": None}, {"factory": "os:system"})
    ),
    lambda random: [random.choice(_NUMBERS) for _ in range(random.choice((2, 2_000)))],
    lambda random: "".join(
        chr(random.randrange(0x110000)) for _ in range(random.randrange(1, 300))
    ),
    _nested,
)


def _somewhere(random: Random, tree: dict[str, Any]) -> str:
    """A path of the tree, of one of its sections, or of nothing."""
    path = random.choice([*flatten(tree), *tree])
    return (
        path
        if random.random() < 0.7
        else random.choice((f"{path}.x", path[:-1] or "y", "x." * 50 + "x", path.partition(".")[0]))
    )


def _change(random: Random, tree: dict[str, Any]) -> dict[str, Any]:
    try:
        return set_path(tree, _somewhere(random, tree), _value(random))
    except KeyError:
        return tree


def _change_space(random: Random, tree: dict[str, Any]) -> dict[str, Any]:
    space = copy.deepcopy(SPACE)
    path = random.choice(
        [
            *space,
            "training.seed",
            "training.lr",
            "model.width",
            "sparsifier",
            "data.augment.crop",
            "x.y",
            "",
        ]
    )
    parts: dict[str, Callable[[], Any]] = {
        "low": lambda: random.choice((_value(random), 1, 0.001, 1e-300, -1e308, 10**18)),
        "high": lambda: random.choice((_value(random), 5, 0.9, 1.7e308, 2**62)),
        "step": lambda: random.choice((_value(random), 1, 1e-300, 1e-9, 1e-12, 5e-324, 10**18)),
        "log": lambda: random.choice((True, _value(random))),
        "choices": lambda: [_value(random) for _ in range(random.choice((1, 3, 2_000)))],
    }
    chosen = random.choice(
        (
            ["low", "high"],
            ["low", "high", "step"],
            ["low", "high", "log"],
            ["choices"],
            random.sample([*parts], 3),
        )
    )
    space[path] = (
        {part: parts[part]() for part in chosen} if random.random() < 0.9 else _value(random)
    )
    return tree | {"space": space}


def _start(random: Random, tree: dict[str, Any]) -> dict[str, Any]:
    right = {
        "penalties.layer.strength": 1,
        "sparsifier.sparsity": 0.5,
        "model.depth": 2,
        "training.optimizer": "sgd",
    }
    starts = [
        right | {random.choice([*SPACE, "model.dept"]): random.choice((_value(random), 2, 0.5))}
        for _ in range(random.choice((1, 3, 3_000)))
    ]
    space = {
        f"{path}{random.choice(('', '', '', '', '', 'x'))}": parameter
        for path, parameter in SPACE.items()
    }
    return tree | {
        "space": space,
        "search": tree["search"]
        | {"start_from": starts if random.random() < 0.9 else _value(random)},
    }


def _bomb(random: Random) -> str:
    width, depth = random.choice(((10, 9), (2, 40), (100, 4), (3, 2_000)))
    opened, closed = random.choice(("[]", "{}"))
    items = [f"k{n}: *a{{}}" if opened == "{" else "*a{}" for n in range(width)]
    lines = [
        f"a{n}: &a{n} {opened}{', '.join(i.format(n - 1) for i in items)}{closed}"
        for n in range(1, depth)
    ]
    return "\n".join(["a0: &a0 lol", *lines, f"name: *a{depth - 1}"])


def _large(random: Random) -> str:
    return random.choice(
        (
            lambda: "\n".join(f"k{n}: {n}" for n in range(20_000)),
            lambda: "space:\n" + "\n".join(f"  k{n}: {{low: 1, high: 2}}" for n in range(5_000)),
            lambda: f"name: {'x' * 150_000}",
            lambda: f"{'k' * 100_000}: 1",
            lambda: "- 1\n" * 60_000,
            lambda: "[" * 190_000,
            lambda: "#" * 199_000,
            lambda: "x" * 1_000_000,
            lambda: "".join(" " * n + f"k{n}:\n" for n in range(500)),
        )
    )()


def _damage(random: Random, content: bytes) -> bytes:
    """Bytes lost, added, changed or said twice."""
    damaged = bytearray(content)
    for _ in range(random.choice((1, 3, 30))):
        at = random.randrange(len(damaged) or 1)
        what = random.randrange(4)
        if what == 0:
            del damaged[at : at + random.randrange(1, 40)]
        elif what == 1:
            damaged[at:at] = random.randbytes(random.randrange(1, 5))
        elif what == 2:
            damaged[at : at + 1] = random.choice(
                (
                    b":",
                    b"{",
                    b"]",
                    b"\t",
                    b"\n",
                    b"&a ",
                    b"*a",
                    b"!",
                    b"%",
                    b"\xff",
                    b"\xed\xa0\x80",
                    b"- ",
                )
            )
        else:
            damaged[at:at] = damaged[at : at + 60]
    return bytes(damaged)


def _override(random: Random, tree: dict[str, Any]) -> str:
    paths = (
        _somewhere(random, tree | {"space": SPACE}),
        "space.model.depth.low.x",
        "space",
        "name.first",
        ".",
        "a" * 400,
        "a." * 200,
        "",
    )
    value = random.choice(
        (_yaml(_value(random)), random.choice(_FRAGMENTS), "\udcff", _bomb(random)[:90_000])
    )
    # An argument of a process holds no zero byte, and is bounded.
    return (
        f"{random.choice((paths[0], *paths))}{random.choices(('=', ''), (9, 1))[0]}{value}".replace(
            "\x00", ""
        )[:100_000]
    )


FILES = ("pipe", "/dev/zero", "/dev/urandom", "directory", "loop", "dangling", "huge", "name")
"""What can stand in place of a file: 50 MB of zeros is `huge`, `name` is a file with a line break
in its name."""


def draw(seed: int) -> Broken:
    """The broken config of this number."""
    random = Random(seed)  # noqa: S311 (nothing secret)
    tree: dict[str, Any] = BASE | {"space": copy.deepcopy(SPACE)}
    right = _yaml(tree).encode()
    kind = random.choice(
        (
            "values",
            "values",
            "space",
            "starts",
            "text",
            "override",
            "override",
            "bomb",
            "large",
            "file",
        )
    )
    if kind == "file":
        return Broken(kind, right, file=random.choice(FILES))
    if kind in ("bomb", "large"):
        text = _bomb(random) if kind == "bomb" else _large(random)
        whole = f"{text}\nsearch: {_yaml(BASE['search'])}" if random.random() < 0.3 else text
        return Broken(kind, whole.encode())
    if kind == "text":
        lines = "\n".join(f"{key}: {_yaml(value)}" for key, value in tree.items())
        return Broken(kind, _damage(random, lines.encode()))
    if kind == "override":
        return Broken(
            kind, right, tuple(_override(random, tree) for _ in range(random.choice((1, 1, 3))))
        )
    change = {"values": _change, "space": _change_space, "starts": _start}[kind]
    for _ in range(random.randrange(1, 4) if kind == "values" else 1):
        tree = change(random, tree)
    return Broken(kind, _yaml(tree).encode("utf-8", "surrogatepass"))
