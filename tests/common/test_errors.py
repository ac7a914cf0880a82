"""Messages are printable lines; failures of the machine have one, bugs keep their traceback."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from support.settings import ROOT

from pipeline.gem.common.errors import GemError, examples
from pipeline.gem.common.logs import LINE_LENGTH, printable


@pytest.mark.parametrize(
    "text, line",
    [
        ("µg and 药物 and é", "µg and 药物 and é"),
        ("two\nlines\tand\rmore", r"two\nlines\tand\rmore"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u202eevil\u200b\u00ad\ufeff", r"\u202eevil\u200b\xad\ufeff"),
        ("a\u00a0b \u3164\u2800", r"a\xa0b \u3164\u2800"),
        ("\udcff\ue000\U000e0041", r"\udcff\ue000\U000e0041"),
    ],
)
def test_what_is_invisible_in_a_message_becomes_an_escape(text, line):
    assert printable(text) == line == GemError(text).problems[0] == str(GemError(text))


@pytest.mark.parametrize(
    "text",
    [
        f"params.yaml:3: {'x' * 10_000} is unknown; remove it",
        f"params.yaml:3: {'word ' * 10_000}is unknown; remove it",
        f"params.yaml:3: {'/a' * 200} and {'/b' * 200} are one; remove it",
        "params.yaml:3: " + ", ".join(["y" * 200] * 5) + "; remove it",
    ],
)
def test_a_long_message_keeps_its_place_and_its_advice(text):
    (line,) = GemError(text).problems
    assert len(line) <= LINE_LENGTH and "..." in line
    assert line.startswith("params.yaml:3: ") and line.endswith("; remove it")


def test_a_short_message_stays_and_long_examples_are_shortened():
    path = "/a" * 130 + ": absent"
    assert GemError(path).problems == (path,)
    assert examples(["a", "b" * 99, "c\n"]) == f"a, {'b' * 34}...{'b' * 23}, c"


# What ends a command: an expression in a process of its own, the exit code, a part of the line.
FAILURES = [
    ("raise OSError(errno.ENOSPC, 'No space left on device', 'a/b')", 2, "a/b: No space left"),
    ("raise OSError('[Errno 28] Error writing bytes to file')", 2, "No space left on device; free"),
    ("raise RuntimeError('x (errno = 122, error message')", 2, "Disk quota exceeded; free"),
    ("open('/proc/nothing', 'w')", 2, "/proc/nothing: No such file"),
    ("open('/proc/version/x')", 2, "/proc/version/x: Not a directory; move away"),
    ("open('x' * 300, 'w')", 2, "File name too long; use a shorter path"),
    ("raise OSError(errno.EROFS, 'Read-only file system', 'x')", 2, "x: Read-only file system"),
    ("raise PermissionError(errno.EACCES, 'Permission denied', 'x\\ny')", 2, r"x\ny: Permission"),
    ("raise OSError(errno.ENOLCK, 'No locks available')", 2, "No locks available; the file system"),
    ("raise OSError(errno.EIO, 'Input/output error', 'x')", 2, "x: Input/output error; check"),
    ("raise OSError(errno.EMFILE, 'Too many open files', 'x')", 2, "ulimit -n 4096"),
    ("bytearray(10**18)", 2, "not enough memory"),
    ("raise RuntimeError('... DefaultCPUAllocator: can\\'t allocate')", 2, "not enough memory"),
    ("import numpy; numpy.empty(10**15)", 2, "not enough memory"),
    (
        "database()",
        2,
        "(mlflow.db or .gem/optuna.db): attempt to write a readonly",
    ),
    ("raise KeyboardInterrupt", 75, "stopped: by SIGINT; run the same command again"),
    ("os.kill(os.getpid(), 15); time.sleep(9)", 75, "stopped: by SIGTERM; run the same"),
]
SCRIPT = """
import errno, os, sqlite3, time
from pipeline.gem.common.errors import exit_with
def database():
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA query_only = 1")
    connection.execute("CREATE TABLE a (b)")
def main():
    """


def command(body: str, **settings) -> subprocess.CompletedProcess:
    code = f"{SCRIPT}{body}\nexit_with(main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **settings
    )


@pytest.mark.parametrize("body, code, part", FAILURES)
def test_a_failure_of_the_machine_is_one_line_and_an_exit_code(body, code, part):
    result = command(body)
    assert result.returncode == code, result.stderr
    assert part in result.stderr and result.stderr.count("\n") == 1 and len(result.stderr) < 320


@pytest.mark.parametrize(
    "body", ["{}['x']", "raise RuntimeError('shapes differ')", "raise ValueError('28')", "1 / 0"]
)
def test_a_bug_keeps_its_traceback(body):
    result = command(body)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.endswith("with the lines above\n")


def test_a_bug_in_the_handling_of_a_failure_is_a_bug():
    result = command("try: open('/proc/nothing', 'w')\n    except OSError as error: error.nothing")
    assert result.returncode == 1 and "AttributeError" in result.stderr


@pytest.mark.parametrize("body", ["print('x' * 10**6)", "print('x')"])
def test_a_reader_that_ends_early_ends_the_command_without_a_word(body):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"{SCRIPT}{body}\nexit_with(main)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_log_without_a_reader_does_not_end_the_work():
    reader, writer = os.pipe()
    os.close(reader)
    body = (
        "import logging, sys\n    log = logging.getLogger('pipeline.x')\n"
        "    for _ in range(3): log.info('x' * 10**5)\n    print('done', file=sys.stderr)"
    )
    code = f"{SCRIPT}{body}\nexit_with(main)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "done\n")


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        code = f"{SCRIPT}print('x')\nexit_with(main)"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 2
    assert result.stderr == f"error: {os.strerror(errno.ENOSPC)}; free some space, " + (
        "then run the same command again\n"
    )
