"""The origin of results: DVC's hash of the data and the commit of the code, for MLflow only.

No output of DVC may contain either: equal results must be equal files.
"""

import configparser
import hashlib
import subprocess
from pathlib import Path

from pipeline.gem.common import yaml_file

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
    settings.read([".dvc/config", ".dvc/config.local"])
    if settings.get("core", "no_scm", fallback="false").lower() == "true":
        return None
    return (
        f"{folder}: not a git repository, which DVC needs; run `git init`, or "
        "`.venv/bin/dvc config core.no_scm true` to work without git"
    )


def code_tags() -> dict[str, str]:
    """The commit, and whether the working tree differs from it; empty outside of git."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        difference = _git("diff", "HEAD", "--", *_SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return {}
    tags = {"git.commit": commit, "git.dirty": str(bool(difference)).lower()}
    if difference:
        tags["git.diff_sha256"] = hashlib.sha256(difference.encode()).hexdigest()
    return tags


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=30
    ).stdout
