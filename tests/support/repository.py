"""A temporary repository with tiny parameters: real git, real DVC, real MLflow, real Optuna."""

import importlib
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import optuna
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from pipeline.gem.common import yaml_file
from pipeline.gem.common.errors import exit_with
from pipeline.gem.training import checkpoint
from pipeline.gem.training.distributed import launch_config
from support.settings import ROOT

FOLDERS = ("pipeline", "experiments/searches", "data/tables")
FILES = ("params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", "requirements.lock")
# Changes of the committed searches: fewer epochs everywhere, smaller sizes in latent_kl.
TINY_EPOCHS = ((r"\nepochs: \d+", "\nepochs: 3"),)
TINY_SEARCH = (
    *TINY_EPOCHS,
    (r"type: integer, low: \d+, high: \d+", "type: integer, low: 2, high: 16"),
    # Not the default model, so that an evaluation has two.
    (r"latent: \{.*\}", "latent: {technical: 5, biological: 4, perturbation: 4}"),
    (r"\n  seeds: \[2, 3, 4\]\n  epochs: \d+", r"\n  seeds: [2, 3]\n  epochs: 2"),
)
STORES = ("MLFLOW_", "OPTUNA_", "DVC_", "GIT_")  # variables of the caller that stages must not see


class Repository:
    """A folder in which the stages run as a user runs them."""

    def __init__(self, folder: Path, changes: dict[str, object]):
        self.folder = folder
        for name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        yaml_file.edit(folder / "params.yaml", changes)
        for path in (folder / "experiments" / "searches").glob("*.yaml"):
            text = path.read_text()
            for pattern, value in TINY_SEARCH if path.stem == "latent_kl" else TINY_EPOCHS:
                text, number = re.subn(pattern, value, text)
                assert number, f"{pattern} is not in {path.name}"
            path.write_text(text)
        self.git("init", "--quiet")
        self.commit("start")

    @classmethod
    def copy_of(cls, source: Path, folder: Path) -> "Repository":
        """A copy of a repository. Artifacts of MLflow stay where `source` wrote them."""
        shutil.copytree(source, folder, symlinks=True)
        repository = cls.__new__(cls)
        repository.folder = folder
        return repository

    def environment(self, store: str | None) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(STORES)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "GEM_WORKERS": "1"}
        return environment | ({"MLFLOW_TRACKING_URI": store} if store else {})

    def run(
        self, *command: str, expect: int = 0, store: str | None = None
    ) -> subprocess.CompletedProcess:
        """Runs a command here. AssertionError with its output for another exit code."""
        process = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(store),
            capture_output=True,
            text=True,
            timeout=900,
        )
        output = f"{process.stdout[-3000:]}\n{process.stderr[-3000:]}"
        assert process.returncode == expect, f"{command}: {process.returncode}\n{output}"
        return process

    def python(
        self, module: str, *arguments: str, expect: int = 0, store: str | None = None
    ) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", module, *arguments, expect=expect, store=store)

    def dvc(self, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "dvc", *arguments, expect=expect)

    def start(self, module: str, *arguments: str, ranks: int = 1, **environment: str) -> "Stage":
        """Starts a stage in the background, as `ranks` processes of torchrun's engine; its output
        is appended to the file `module`.log."""
        # Absolute: the forked process inherits open stores, and a relative path names another file.
        store = f"sqlite:///{self.folder}/mlflow.db"
        return Stage(self.folder, module, arguments, self.environment(store) | environment, ranks)

    def log(self, module: str) -> str:
        """Output of all calls of a stage by `start`."""
        path = self.folder / f"{module}.log"
        return path.read_text() if path.exists() else ""

    def stage(
        self, module: str, *arguments: str, expect: int = 0, ranks: int = 1, **environment: str
    ) -> str:
        """Runs a stage and returns its output. Faster than `python`: nothing is imported again."""
        before = len(self.log(module))
        code = self.start(module, *arguments, ranks=ranks, **environment).wait(timeout=900)
        output = self.log(module)[before:]
        assert code == expect, f"{module}: {code}, expected {expect}\n{output[-3000:]}"
        return output

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Trials of the only search here, without its confirmation."""
        storage = f"sqlite:///{self.folder}/.gem/optuna.db"
        name = next(name for name in optuna.get_all_study_names(storage) if "." not in name)
        return optuna.load_study(study_name=name, storage=storage).trials

    def git(self, *arguments: str) -> str:
        settings = ("user.name=Test", "user.email=test@example.org", "commit.gpgsign=false")
        options = (part for setting in settings for part in ("-c", setting))
        return self.run("git", *options, *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)


@cache
def prepare_to_fork() -> None:
    """What is the same in all stages, before any fork: the first store imports for seconds."""
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    importlib.import_module("mlflow.store.model_registry.sqlalchemy_store")
    # Which module belongs to which package: a second for every process that registers a model.
    importlib.import_module("mlflow.utils.requirements_utils")._init_modules_to_packages_map()
    # Which files decide the bits of a fit: a quarter of the time of a tiny one.
    checkpoint._code()


class Program(NamedTuple):
    """A stage to run, and where."""

    main: Callable[[], None]
    folder: Path
    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


class Stage:
    """A stage in a forked process, which need not import anything again."""

    def __init__(
        self,
        folder: Path,
        module: str,
        arguments: tuple[str, ...],
        environment: dict[str, str],
        ranks: int,
    ):
        main = importlib.import_module(module).main
        prepare_to_fork()
        program = Program(main, folder, module, arguments, environment)
        run, options = (_run, (program,)) if ranks == 1 else (_run_ranks, (program, ranks))
        self._process = multiprocessing.get_context("fork").Process(target=run, args=options)
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


def _run_ranks(program: Program, ranks: int) -> None:
    """The engine of torchrun, with forked ranks."""
    logging.disable(logging.CRITICAL)
    try:
        elastic_launch(launch_config(ranks, "fork"), _run_rank)(program)
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


def _run_rank(program: Program) -> None:
    logging.disable(logging.NOTSET)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank = {name: os.environ[name] for name in (*names, "TORCHELASTIC_USE_AGENT_STORE")}
    _run(program._replace(environment=program.environment | rank))


def _run(program: Program) -> None:
    log_file = program.folder / f"{program.module}.log"
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run_main(*program, streams=(0, log, log))


def run_main(
    main: Callable[[], None],
    folder: Path,
    module: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    streams: Sequence[int],
) -> None:
    """Runs a stage in this process. `streams`: descriptors of its input, output and errors."""
    warnings.resetwarnings()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    # Open until the process ends.
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [module, *arguments]
    try:
        exit_with(main)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
