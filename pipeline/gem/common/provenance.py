"""The origin of results: DVC's hash of the data and the commit of the code, for MLflow only.

No output of DVC may contain either: equal results must be equal files.
"""

import configparser
import hashlib
import logging
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pipeline.gem.common import yaml_file

log = logging.getLogger(__name__)

_SOURCES = ("pipeline", "params.yaml", "requirements.lock")  # a change may change a result


def data_digest(folder: str, fallback: str) -> str:
    """DVC's hash of a folder in dvc.lock; without one, the start of `fallback`."""
    lock = Path("dvc.lock")
    if lock.exists():
        for stage in yaml_file.read(lock).values.get("stages", {}).values():
            for output in stage.get("outs", []):
                if output["path"] == folder:
                    return output["md5"]
    return fallback[:32]


def repository_problem() -> str | None:
    """Why DVC would refuse to run here, or None: it needs git's folder, here or above."""
    folder = Path.cwd()
    if any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return None
    settings = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        settings.read([".dvc/config", ".dvc/config.local"])
    except (configparser.Error, UnicodeError) as error:
        reason = " ".join(str(error).split())
        return f".dvc/config or .dvc/config.local: cannot be read ({reason}); correct it"
    if settings.get("core", "no_scm", fallback="false").lower() == "true":
        return None
    return (
        f"{folder}: not a git repository, which DVC needs; run `git init`, or "
        "`.venv/bin/dvc config core.no_scm true` to work without git"
    )


@cache
def code_tags() -> Mapping[str, str]:
    """The commit, and whether the working tree differs from it. Empty with a warning where git
    refuses. Determined once a process: an edit during a search is not the code that runs."""
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        difference = _git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", *_SOURCES)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the runs in MLflow carry no git commit: %s", _git_problem(error))
        return {}
    tags = {"git.commit": commit, "git.dirty": str(bool(difference)).lower()}
    if difference:
        tags["git.diff_sha256"] = hashlib.sha256(difference).hexdigest()
    return tags


def _git(*arguments: str) -> bytes:
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        ["git", *arguments], capture_output=True, env=environment, check=True, timeout=30
    ).stdout


def _git_problem(error: Exception) -> str:
    """What git says, with its advice if it gives one."""
    if not isinstance(error, subprocess.CalledProcessError):
        return f"git cannot be run ({error})"
    lines = error.stderr.decode(errors="replace").splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith("git config")]
    what = next(iter(lines), "").removeprefix("fatal: ")
    return f"{what}; run `{commands[0]}`" if commands else f"{what}; see `git status`"
