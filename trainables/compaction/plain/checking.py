"""What plain data of a network may say, which is checked before anything is made of it."""

from slimfront.trainables.compaction.plain.arguments import Plain
from slimfront.trainables.compaction.plain.modules import TENSORS
from slimfront.trainables.structure import operations

OPERATIONS = ("placeholder", "output", "call_module", "call_function", "call_method", "get_attr")


def check_plain(plain: Plain) -> None:
    """Checks what would be looked up or become code when a network is made of plain data, before
    anything is made.

    torch.fx writes names into code that it runs, and calls methods by their name: nothing but names
    of ours may get there.

    Raises:
        ValueError: if a name is none, or an operation, module or method is not one that `serialise`
            stores.
    """
    modules = plain["modules"]
    for name, stored in modules.items():
        _check_path(name)
        kind = stored["kind"]
        if kind not in TENSORS and operations.kind_of(kind) is None:
            raise ValueError(f"it has a module of the unknown kind {_shown(kind)}")
    for node in plain["nodes"]:
        operation = node["op"]
        target = node["target"]
        if operation not in OPERATIONS or not _is_known(operation, target, modules):
            raise ValueError(
                f"it has an unknown operation, {_shown(operation)} of {_shown(target)}"
            )
        _check_path(node["name"], parts=1)
        for name in node["kwargs"]:
            _check_path(name, parts=1)
        if operation == "placeholder":
            _check_path(target, parts=1)


def _is_known(operation: str, target: object, modules: Plain) -> bool:
    """Whether an operation of a stored graph has something to act on or with."""
    if operation in ("placeholder", "output"):
        return True
    if not isinstance(target, str):
        return False
    if operation == "call_method":
        return target in operations.methods()
    if operation in ("call_module", "get_attr"):
        return target in modules
    if target in operations.ATTRIBUTES:
        return True
    return operations.function_of(target) is not None


def _check_path(path: object, parts: int | None = None) -> None:
    """Raises ValueError if `path` is not names with dots between them, each a number, or an
    identifier, but for hyphens."""
    if not isinstance(path, str) or not _is_path(path, parts):
        raise ValueError(f"{_shown(path)} is no name of a part of a network")


def _is_path(path: str, parts: int | None) -> bool:
    names = path.split(".")
    if not all(_is_part(name) for name in names):
        return False
    if parts is None:
        return True
    # It stands in code as it is.
    if len(names) != parts:
        return False
    return all(name.isidentifier() for name in names)


def _is_part(name: str) -> bool:
    """Whether a name is a number, or an identifier but for hyphens, and not one of Python's own."""
    if name.startswith("__"):
        return False
    if name.isdecimal():
        return True
    without_hyphens = name.replace("-", "_")
    return without_hyphens.isidentifier()


def _shown(value: object) -> str:
    """What is said of a value that should not be there."""
    return repr(value)[:60]
