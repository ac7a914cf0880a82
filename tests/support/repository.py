"""A temporary clone of this repository with tiny parameters: real git, real DVC, real MLflow, real Optuna."""

import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import optuna
import torch

from pipeline.gem.common import yaml_file
from pipeline.gem.common.errors import exit_with
from support.settings import ROOT

PARTS = (
    "pipeline",
    "experiments",
    "data/tables",
    "params.yaml",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    "requirements.lock",
)
TINY_STUDY = (  # whatever the committed study asks: smaller sizes, fewer epochs
    (r"type: integer, low: \d+, high: \d+", "type: integer, low: 2, high: 16"),
    (r"latent: \{.*\}", "latent: {technical: 4, biological: 4, perturbation: 4}"),
    (r"\nepochs: \d+", "\nepochs: 3"),
    (r"min_epochs: \d+", "min_epochs: 1"),
)


def _answers(path: str, names: list[str]) -> list[str]:
    """Results of committed experiments stay behind: the stages write them anew."""
    return [name for name in names if (Path(path) / name).is_dir() and name != "searches"]


class Repository:
    """A folder in which the stages run as a user runs them."""

    def __init__(self, folder: Path, changes: dict[str, object]):
        self.folder = folder
        folder.mkdir(parents=True)
        for part in PARTS:
            source = ROOT / part
            (folder / part).parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(
                    source,
                    folder / part,
                    ignore=_answers
                    if part == "experiments"
                    else shutil.ignore_patterns("__pycache__"),
                )
            else:
                shutil.copy(source, folder / part)
        (folder / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc" / "config")
        yaml_file.edit(folder / "params.yaml", changes)
        study = folder / "experiments" / "searches" / "latent_kl.yaml"
        text = study.read_text()
        for before, after in TINY_STUDY:
            text, number = re.subn(before, after, text)
            assert number, f"{before} is not in the study"
        study.write_text(text)
        self.git("init", "--quiet")
        self.commit("start")

    def environment(self, store: str | None) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "OPTUNA_", "DVC_", "GIT_"))
        }
        return kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **({"MLFLOW_TRACKING_URI": store} if store else {}),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(
        self, *command: str, expect: int = 0, store: str | None = None
    ) -> subprocess.CompletedProcess:
        """Runs a command here; fails with its output where the exit code is another."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(store),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == expect, (
            f"{' '.join(command)} gave {done.returncode}, expected {expect}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def python(
        self, module: str, *arguments: str, expect: int = 0, store: str | None = None
    ) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", module, *arguments, expect=expect, store=store)

    def dvc(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "dvc", *arguments, expect=expect)

    def start(self, module: str, *arguments: str, **environment: str) -> "Stage":
        """A stage in the background; its output goes to `module`.log here, after what is there."""
        # Absolute: a forked process has the stores that this one opened, and `sqlite:///mlflow.db` is another in every folder.
        store = f"sqlite:///{self.folder}/mlflow.db"
        return Stage(self.folder, module, arguments, self.environment(store) | environment)

    def said(self, module: str) -> str:
        """What all calls of a stage by `start` have said."""
        log = self.folder / f"{module}.log"
        return log.read_text() if log.exists() else ""

    def stage(self, module: str, *arguments: str, expect: int = 0, **environment: str) -> str:
        """What `python` does and says, without the seconds that an interpreter needs to import everything."""
        before = len(self.said(module))
        code = self.start(module, *arguments, **environment).wait(timeout=900)
        said = self.said(module)[before:]
        assert code == expect, f"{module} gave {code}, expected {expect}\n{said[-3000:]}"
        return said

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Of the only search here, its confirmation apart."""
        storage = f"sqlite:///{self.folder}/.gem/optuna.db"
        return optuna.load_study(
            study_name=next(
                name for name in optuna.get_all_study_names(storage) if "." not in name
            ),
            storage=storage,
        ).trials

    def git(self, *arguments: str) -> str:
        identity = (
            "-c",
            "user.name=Test",
            "-c",
            "user.email=test@example.org",
            "-c",
            "commit.gpgsign=false",
        )
        return self.run("git", *identity, *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)


@cache
def _import_late_ones() -> None:
    """What the first optimiser and the first store import for seconds: once, before anything is forked."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    importlib.import_module("mlflow.store.model_registry.sqlalchemy_store")
    # Which module belongs to which package: a second of reading for every process that registers a model.
    importlib.import_module("mlflow.utils.requirements_utils")._init_modules_to_packages_map()


class Stage:
    """A stage in a process forked from this one, which has imported everything: a third of the time of a new interpreter."""

    def __init__(
        self, folder: Path, module: str, arguments: tuple[str, ...], environment: dict[str, str]
    ):
        main = importlib.import_module(module).main
        _import_late_ones()
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(main, folder, module, arguments, environment)
        )
        self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; negative for a signal."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s"
        return self._process.exitcode


def _run(
    main, folder: Path, module: str, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    warnings.resetwarnings()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    log = os.open(f"{module}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - until the process ends
    sys.argv = [module, *arguments]
    try:
        exit_with(main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
