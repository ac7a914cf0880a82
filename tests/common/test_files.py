"""Atomic writes, strict JSON and hashes."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from pipeline.gem.common import files
from pipeline.gem.common.files import (
    atomic_replacement,
    folder_replacement,
    sha256_of,
    write_atomically,
    write_json,
)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for content in (b"long content", b"short", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert names_in(path.parent) == ["file.bin"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_an_atomic_write_keeps_the_mode_of_the_file(tmp_path, mode):
    write_atomically(tmp_path / "file", b"old")
    (tmp_path / "file").chmod(mode)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("kind", ["symlink", "hardlink"])
@pytest.mark.parametrize("name", ["file", "folder/file"])
def test_nothing_is_written_through_a_link(tmp_path, kind, name):
    """DVC's cache may be links to read-only files."""
    cached, path = tmp_path / "cached", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    cached.write_bytes(b"old")
    cached.chmod(0o444)
    path.symlink_to(cached) if kind == "symlink" else path.hardlink_to(cached)
    if name == "file":
        write_atomically(path, b"new")
    else:
        with folder_replacement(path.parent) as folder:
            (folder / "file").write_bytes(b"new")
    assert cached.read_bytes() == b"old" and cached.stat().st_mode & 0o777 == 0o444
    assert path.read_bytes() == b"new" and not path.is_symlink()
    assert path.stat().st_mode & 0o200


@pytest.mark.parametrize("failure", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise error

    owner = files.Path if failure == "chmod" else files.os
    monkeypatch.setattr(owner, failure, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["file"]


def strays(folder) -> list[str]:
    return [name for name in names_in(folder) if name.endswith(".tmp")]


@pytest.mark.parametrize("name", ["file", "n" * 255, "[*]"])
def test_a_replacement_is_complete_or_absent_and_removes_files_of_ended_processes(tmp_path, name):
    path = tmp_path / name
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with atomic_replacement(path) as temporary:
        temporary.write_bytes(b"")
    for process in (ended.pid, os.getppid()):
        stray = temporary.with_name(temporary.name.replace(str(os.getpid()), str(process)))
        stray.write_bytes(b"partial")
    path.unlink()
    with pytest.raises(KeyboardInterrupt), atomic_replacement(path) as temporary:
        temporary.write_bytes(b"partial")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == [stray.name]  # of a running process
    with atomic_replacement(path) as temporary:
        temporary.write_bytes(b"complete")
        assert not path.exists()
    assert path.read_bytes() == b"complete" and strays(tmp_path) == [stray.name]


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("old", [None, "folder", "link"])
def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path, failure, old):
    path, target = tmp_path / "place" / "folder", tmp_path / "target"
    if old:
        target.mkdir()
        (target / "old").write_bytes(b"old")
        path.parent.mkdir()
        target.rename(path) if old == "folder" else path.symlink_to(target)
    expected = pytest.raises(type(failure)) if failure else nullcontext()
    with expected as caught, folder_replacement(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "new").write_bytes(b"x" * 10_000)
        if failure:
            raise failure
    if not failure:
        assert names_in(path) == ["deep"] and not path.is_symlink()
    elif old:
        assert (path / "old").read_bytes() == b"old" and names_in(path) == ["old"]
    else:
        assert not path.exists()
    assert strays(path.parent) == []
    if isinstance(failure, OSError):
        assert "needed 0.01 MB or more" in str(caught.value) and str(path) in str(caught.value)
    if old == "link":
        assert (target / "old").read_bytes() == b"old"


def test_a_folder_that_cannot_be_renamed_is_replaced(tmp_path, monkeypatch):
    """A folder of a container's image: the kernel answers EXDEV."""
    rename = os.rename

    def refuse(source, target):
        if source == tmp_path / "folder":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(files.os, "rename", refuse)
    with folder_replacement(tmp_path / "folder") as folder:
        (folder / "new").write_bytes(b"new")
    assert names_in(tmp_path) == ["folder"] and names_in(tmp_path / "folder") == ["new"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_json_with_a_number_that_is_not_finite_is_an_error_and_the_old_file_stays(tmp_path, value):
    write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"a": value})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}


def test_a_hash_depends_on_the_order_of_lists_and_not_of_keys():
    assert sha256_of({"a": 1, "b": [1, 2]}) == sha256_of({"b": [1, 2], "a": 1})
    assert sha256_of([1, 2]) != sha256_of([2, 1])
    assert sha256_of("ab", "c") != sha256_of("a", "bc")
