"""Folders in places that others can write to as well: used only if they are this user's alone."""

import errno
import os
import stat
from pathlib import Path


def own_folder(path: Path, *, named: bool = False) -> Path:
    """The folder at `path`, which is made for this user alone if it is not there.

    Whoever can write to it could put data and networks there, and have files of others deleted
    through links. What is there is checked each time, since another user may have made it first:
    its name can be guessed.

    Args:
        named: the user named it, so that it may be reached through links.

    Raises:
        OSError: if it cannot be made, is a link or no folder, belongs to another user, or others
            may write to it or replace it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = path.stat() if named else path.lstat()
    above = path.parent.stat()
    if not stat.S_ISDIR(state.st_mode):
        raise _refused(path, "it is a link, and not a folder")
    if state.st_uid != os.getuid():
        raise _refused(path, "it belongs to another user")
    if state.st_mode & 0o022:
        raise _refused(
            path, "others may write to it; run: chmod go-w on it, if what is in it is yours"
        )
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise _refused(path, "others may replace it, for the folder above it is writable for all")
    return path


def _refused(path: Path, reason: str) -> PermissionError:
    return PermissionError(errno.EPERM, reason, str(path))
