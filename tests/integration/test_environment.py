"""Make works in any folder, for a user without name and home; what it cannot do is one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.settings import ROOT

TARGETS = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
FOLDERS = (
    "two words",
    "l'année à 50% #1",
    "$HOME ${USER} $$",
    'a "quote" `and` more',
    "a;b & (c) | d > e",
    "-n",
    "long" * 50,
)
# Instead of Python: writes down its arguments.
STUB = """#!/bin/sh
printf '%s\\037' "$PWD" "$USER" "$LOGNAME" "$HOME" "$@" >> "$CALLS"; echo >> "$CALLS"
printf '%s\\n' "$OPTUNA_STORAGE" "$MLFLOW_BACKEND_STORE_URI" > "$CALLS.addresses"
"""


@pytest.fixture
def make(tmp_path):
    """A function: runs make in a new folder of this name; the process and the calls of Python, as
    (working directory, USER, LOGNAME, HOME, arguments...)."""

    def write_stub(program: Path) -> None:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STUB)
        program.chmod(0o755)

    def run(name: str, *arguments: str, without: tuple[str, ...] = ()):
        folder, log = tmp_path / name, tmp_path / "calls"
        log.write_text("")
        if not folder.exists():
            for environment in (".venv", ".venv-cell-eval"):
                write_stub(folder / environment / "bin" / "python")
            (folder / "tests" / "cell_eval").mkdir(parents=True)
            for file in ("requirements.lock", "tests/cell_eval/requirements.lock"):
                (folder / file).touch()
            for environment in (".venv", ".venv-cell-eval"):
                (folder / environment / "installed").touch()
            shutil.copy(ROOT / "Makefile", folder)
            (folder / ".gem").mkdir()
            (folder / ".gem" / "optuna.db").touch()
        # `make test` tells a make that it starts to name its folders in the output.
        hidden = {*without, "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        variables |= {"CALLS": str(log), "PYTHON": str(tmp_path / "python")}
        process = subprocess.run(
            ["make", *arguments], cwd=folder, env=variables, capture_output=True, text=True
        )
        calls = [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]
        return process, calls

    write_stub(tmp_path / "python")
    return run


@pytest.mark.parametrize("name", FOLDERS)
def test_every_target_makes_the_same_calls_in_any_folder(make, tmp_path, name):
    for target in sorted(set(TARGETS) - {"clean"}):
        plain, expected = make("plain", target, "COHORTS=real cohorts")
        process, calls = make(name, target, "COHORTS=real cohorts")
        assert (process.returncode, process.stderr) == (0, plain.stderr) == (0, "")
        assert {call[0] for call in calls} <= {str(tmp_path / name)}
        assert [call[1:] for call in calls] == [call[1:] for call in expected]
        assert calls or target in ("help", "environment")


def test_a_new_environment_is_made_in_any_folder_but_one_with_a_percent_sign(make):
    process, calls = make("a 'b' $c #d", "--always-make", "environment")
    assert process.returncode == 0 and len(calls) == 5, process.stderr
    process, calls = make("50%", "--always-make", "environment")
    assert process.returncode == 2 and not calls
    assert "50%: MLflow cannot be installed in a folder with %" in process.stderr.splitlines()[0]


def test_a_folder_with_a_colon_is_refused_in_one_line(make):
    process, calls = make("a:b", "check")
    assert process.returncode == 2 and not calls
    (line,) = process.stderr.splitlines()
    assert "a:b has a colon in its path, which PATH cannot hold; rename it" in line


@pytest.mark.parametrize("python", ["#!/bin/sh\nexit 1\n", None], ids=["old", "absent"])
def test_an_old_or_absent_python_is_one_line(make, tmp_path, python):
    if python is None:
        arguments = ["PYTHON=no-such-python"]
    else:
        (tmp_path / "old").write_text(python)
        (tmp_path / "old").chmod(0o755)
        arguments = [f"PYTHON={tmp_path / 'old'}"]
    process, _ = make("plain", "--always-make", "environment", *arguments)
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1
    assert "is not Python 3.11 or later; make PYTHON=/path/to/python" in lines[0]


def test_make_names_a_user_without_name_and_home(make):
    _, ((_, user, login, home, *_),) = make("plain", "check", without=("USER", "LOGNAME", "HOME"))
    assert (user, login, home) == (f"user-{os.getuid()}", f"user-{os.getuid()}", "/tmp")
    _, ((_, user, login, home, *_),) = make("plain", "check")
    assert home == os.environ.get("HOME", "/tmp")


# As `docker run --user 12345`: no name in the list of users.
NOBODY = """
import os, pwd
def missing(number):
    raise KeyError(number)
pwd.getpwuid = missing
for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
    os.environ.pop(name, None)
import pipeline, getpass, pathlib
print(getpass.getuser(), pathlib.Path.home())
"""


def test_libraries_get_a_name_and_a_home_for_a_user_without():
    command = [sys.executable, "-c", NOBODY]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split()[0] == f"user-{os.getuid()}", process.stderr[-1000:]
    assert Path(process.stdout.split()[1]).is_dir()


def test_servers_listen_on_this_machine_only(make):
    for target in ("ui", "dashboard"):
        _, calls = make("plain", target)
        arguments = calls[-1]
        assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    pages = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pages += (ROOT / "pipeline").rglob("*.py")
    for page in pages:
        hosts = re.findall(r"--host[= ](\S+)|(0\.0\.0\.0)", page.read_text(encoding="utf-8"))
        assert {host for pair in hosts for host in pair} <= {"127.0.0.1", ""}, page


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("postgresql://gem:pa$$word@host/gem", "postgresql+psycopg://gem:pa$word@host/gem"),
        ("postgres://gem:pa$$word@host/gem", "postgresql+psycopg://gem:pa$word@host/gem"),
        ("sqlite:///~/a b.db", "sqlite:////home/me/a b.db"),
        ("sqlite:///a.db", "sqlite:///a.db"),
    ],
)
@pytest.mark.parametrize(
    ("target", "variable"), [("dashboard", "OPTUNA_STORAGE"), ("ui", "MLFLOW_TRACKING_URI")]
)
def test_the_address_of_a_database_is_neither_output_nor_argument(
    make, tmp_path, target, variable, address, expected
):
    process, calls = make("plain", target, f"{variable}={address}", "HOME=/home/me")
    assert process.returncode == 0 and "pa$" not in f"{process.stdout}{process.stderr}{calls}"
    addresses = (tmp_path / "calls.addresses").read_text().splitlines()
    assert addresses[0 if target == "dashboard" else 1] == expected


def test_the_page_of_a_server_is_opened_there(make):
    process, calls = make("plain", "ui", "MLFLOW_TRACKING_URI=https://me:pa$$word@host:5000/x")
    assert process.returncode == 0 and not calls
    assert process.stdout.strip().endswith("open it there: https://host:5000/x")
