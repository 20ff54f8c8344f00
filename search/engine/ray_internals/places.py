"""Where Ray keeps its files on this machine, looked at before it starts: it ends its whole process
where it cannot write, and says little where a path is too long for a socket."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from slimfront.trainables.errors import UserError

log = logging.getLogger(__name__)

_ROOM_BYTES = 30_000_000
"""What Ray needs for its logs and sockets at least."""
_SHARED = Path("/dev/shm")  # noqa: S108 (where Linux has it)
_USUAL = Path("/tmp")  # noqa: S108 (where Ray takes it to be)
_SOCKET = "ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"
"""The longest path of a socket below Ray's directory, in form."""
_LONGEST = 107
"""How many bytes Linux takes for the path of a socket."""


def check_places() -> None:
    """Looks at Ray's own directory and at shared memory; takes the usual directory where `TMPDIR`
    is too long for sockets, and says so.

    Raises:
        UserError: if either cannot be written to or has no room, or if `RAY_TMPDIR` is too long.
    """
    _check_place(
        _sockets_place(), "its logs and sockets there; set RAY_TMPDIR to another directory"
    )
    _check_place(_SHARED, "results there")


def _sockets_place() -> Path:
    """The directory that Ray will take."""
    chosen = os.environ.get("RAY_TMPDIR")
    place = Path(chosen or os.environ.get("TMPDIR") or _USUAL)
    longest = _LONGEST - len(os.fsencode(os.path.join("/", _SOCKET)))  # noqa: PTH118 (a text)
    length = len(os.fsencode(place))
    if length <= longest:
        return place
    if chosen:
        raise UserError(
            f"Ray cannot start: RAY_TMPDIR ({place}) has {length} characters, and the paths of the "
            f"sockets that it keeps there fit if it has at most {longest}; set it to a shorter one"
        )
    log.warning(
        "Ray keeps its logs and sockets in %s: TMPDIR has %d characters, and the paths of sockets "
        "fit if it has at most %d (RAY_TMPDIR chooses another directory).",
        _USUAL,
        length,
        longest,
    )
    os.environ["RAY_TMPDIR"] = str(_USUAL)
    return _USUAL


def _check_place(folder: Path, what: str) -> None:
    if not folder.is_dir():
        return
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="slimfront-") as file:
            file.write(b"\0" * 4096)
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"Ray cannot start: {folder} cannot be written to ({error.strerror}), and it keeps "
            f"{what}"
        ) from None
    if free < _ROOM_BYTES:
        raise UserError(
            f"Ray cannot start: {folder} has {free / 1e6:.0f} MB left, and it keeps {what}"
        )
