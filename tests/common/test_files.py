"""Atomic writes, strict JSON and hashes."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.gem.common import files
from pipeline.gem.common.files import atomic_replacement, sha256_of, write_atomically, write_json


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


@pytest.mark.parametrize("failure", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(files.os, failure, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["file"]


def test_a_replacement_is_complete_or_absent_and_removes_files_of_ended_processes(tmp_path):
    path = tmp_path / "file"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getppid()):
        (tmp_path / f".file.{process}.tmp").write_bytes(b"partial")
    with pytest.raises(KeyboardInterrupt), atomic_replacement(path) as temporary:
        temporary.write_bytes(b"partial")
        raise KeyboardInterrupt
    running = f".file.{os.getppid()}.tmp"
    assert names_in(tmp_path) == [running]
    with atomic_replacement(path) as temporary:
        temporary.write_bytes(b"complete")
        assert not path.exists()
    assert path.read_bytes() == b"complete" and names_in(tmp_path) == [running, "file"]


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
