"""The same run in another folder, locale, time zone, umask, user and hash seed: the same bytes."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common.files import sha256

# Stages in one process, which imports everything once.
SCRIPT = """
import importlib, sys
from pipeline.gem.common.errors import exit_with
def main():
    for stage in {stages}:
        sys.argv[1:] = ["--search", "latent_kl"] if stage == "tune" else []
        importlib.import_module("pipeline." + stage).main()
exit_with(main)
"""
STAGES = ("synthesize", "prepare", "train", "tune", "evaluate", "register")
# It may read Python's installation, wherever that is, and write what is its own.
OTHER_USER = (
    *("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
SURROUNDINGS = {"TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7", "TMPDIR": "/absent"}
# A folder, and variables. A non-ASCII folder needs UTF-8, which Python turns on for LC_ALL=C. With
# both kinds of quotation marks in a path MLflow cannot create its database.
VARIANTS = {
    "in UTF-8": ("ein Ordner's Größe, 药物 #1 %20", {"LC_ALL": "C", "LANG": "de_DE.UTF-8"}),
    "in ASCII": ("a b", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that another user can reach."""
    top = Path(tempfile.mkdtemp(prefix="gem-"))
    top.chmod(0o755)
    yield top
    shutil.rmtree(top)


def outputs(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The checksums of all files in the folders `names`, by path."""
    files = [file for name in names for file in (folder / name).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def can_be_another_user() -> bool:
    command = [*OTHER_USER, "true"]
    return bool(shutil.which("setpriv")) and not subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_elsewhere_has_the_same_bytes(finished, place, times, variant, record_property):
    if variant == "in ASCII" and times < 4:
        pytest.skip("takes long; run it with --times 4 or more")
    stages, written = STAGES[:3], ("data", "experiments/default")
    if times >= 4:
        stages, written = STAGES, ("data", "experiments")
    name, variables = VARIANTS[variant]
    folder = place / name / ("x" * 150)
    environment = Repository(folder, TINY).environment(None) | SURROUNDINGS | variables
    command, who = [sys.executable, "-c", SCRIPT.format(stages=stages)], "the same user"
    if can_be_another_user():
        subprocess.run(["chown", "-R", "12345:12345", place], check=True)
        command, who = [*OTHER_USER, *command], "another user"
    settings = {"capture_output": True, "text": True, "errors": "replace"}
    result = subprocess.run(command, cwd=folder, env=environment, umask=0o077, **settings)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    expected, here = outputs(finished, written), outputs(folder, written)
    assert set(here) == set(expected)
    assert [file for file in expected if here[file] != expected[file]] == []
    record_property("figure", f"{len(here)} files of {len(stages)} stages, {who}: same bytes")
