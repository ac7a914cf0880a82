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

OUTPUTS = ("data", "experiments")
# All stages in one process, which imports everything once.
SCRIPT = """
import sys
from pipeline import evaluate, prepare, register, synthesize, train, tune
from pipeline.gem.common.errors import exit_with
def main():
    for stage in (synthesize, prepare, train):
        stage.main()
    sys.argv[1:] = ["--search", "latent_kl"]
    tune.main()
    del sys.argv[1:]
    for stage in (evaluate, register):
        stage.main()
exit_with(main)
"""
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


def outputs(folder: Path) -> dict[str, str]:
    """The checksums of all files that the stages wrote, by path."""
    files = [file for name in OUTPUTS for file in (folder / name).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_run_elsewhere_has_the_same_bytes(
    finished, place, times, variant, record_property
):
    if variant == "in ASCII" and times < 4:
        pytest.skip("takes long; run it with --times 4 or more")
    folder, variables = VARIANTS[variant]
    repository = Repository(place / folder / ("x" * 150), TINY)
    is_other = (
        bool(shutil.which("setpriv"))
        and not subprocess.run(
            [*OTHER_USER, "true"], check=False, stderr=subprocess.DEVNULL
        ).returncode
    )
    if is_other:
        subprocess.run(["chown", "-R", "12345:12345", repository.folder], check=True)
    result = subprocess.run(
        [*(OTHER_USER if is_other else []), sys.executable, "-c", SCRIPT],
        cwd=repository.folder,
        env=repository.environment(None) | SURROUNDINGS | variables,
        umask=0o077,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    expected, here = outputs(finished), outputs(repository.folder)
    assert set(here) == set(expected)
    differing = [name for name in expected if here[name] != expected[name]]
    assert differing == []
    who = "as another user" if is_other else "as the same user"
    record_property("figure", f"{len(expected)} files of 6 stages, {who}: same bytes")
