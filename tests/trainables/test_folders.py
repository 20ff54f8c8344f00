import os
from pathlib import Path

import pytest

from slimfront.trainables.folders import own_folder

AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to others")


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    made = own_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert own_folder(made) == made


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722, 0o707])
def test_one_that_others_may_write_to_is_refused_however_it_was_found(
    tmp_path: Path, mode: int
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    for named in (True, False):
        with pytest.raises(PermissionError, match="others may write to it"):
            own_folder(tmp_path / "open", named=named)


def test_a_link_is_followed_only_where_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert own_folder(tmp_path / "link", named=True)
    with pytest.raises(PermissionError, match="it is a link"):
        own_folder(tmp_path / "link")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="exists"):
        own_folder(tmp_path / "nowhere")
    assert not (tmp_path / "gone").exists()


def test_one_that_others_may_replace_is_refused_but_not_in_a_sticky_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="others may replace it"):
        own_folder(shared / "mine")
    shared.chmod(0o1777)
    assert own_folder(shared / "mine")


@AS_ROOT
def test_one_that_belongs_to_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    for named in (True, False):
        with pytest.raises(PermissionError, match="it belongs to another user"):
            own_folder(tmp_path / "theirs", named=named)
