"""Trainings, searches and `dvc repro`, interrupted at random: the results are the same bytes."""

import itertools
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.processes import descendants, is_alive, until
from support.repository import Repository, Stage
from support.settings import TINY

from pipeline.gem.common.files import sha256

STOPPED = 75
EPOCHS = 6
SEARCH = """
description: of this test
space:
  model.latent.technical: {type: integer, low: 2, high: 64, log: true}
  train.kl_weight.technical: {type: float, low: 0.01, high: 4.0, log: true}
baseline: {model: {latent: {technical: 4}}, train: {kl_weight: {technical: 1.0}}}
objective: {metric: predictive_log_likelihood, direction: maximize}
sampler: {name: tpe, seed: 1, startup_trials: 2}
pruner: {name: median, startup_trials: 2, warmup_epochs: 1}
trials: 5
epochs: 3
seeds: [1]
confirm: {top: 1, seeds: [2], epochs: 1}
"""


@pytest.fixture
def repository(no_figures, cohort, migrated_store, tmp_path) -> Repository:
    """A repository with a cohort, a search and an empty store."""
    changes = {"train.epochs": EPOCHS, "train.patience": 99, "train.batch_size": 128}
    repository = Repository(tmp_path / "repository", TINY | changes)
    (repository.folder / "experiments" / "searches" / "short.yaml").write_text(SEARCH)
    shutil.copytree(cohort.folder, repository.folder / "data" / "cohort")
    shutil.copy(migrated_store, repository.folder / "mlflow.db")
    return repository


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def is_writing(repository: Repository) -> bool:
    """Whether a checkpoint is half written."""
    return any((repository.folder / ".gem" / "checkpoints").rglob(".*.tmp"))


def interrupt(repository: Repository, stage: Stage, number: int, seconds: float) -> bool:
    """Sends a signal to a stage after `seconds`, within the write of a checkpoint if there is one
    soon. Returns whether the signal met such a write."""
    with suppress(AssertionError):  # the stage is still running
        stage.wait(timeout=seconds)
    end = time.monotonic() + 0.3
    while not (met := is_writing(repository)) and time.monotonic() < end and is_alive(stage.pid):
        pass
    with suppress(ProcessLookupError):
        stage.send_signal(number)
    return met


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_an_interrupted_stage_gives_the_same_bytes(repository, verb, times, record_property):
    """KILL and TERM in turn. A stage that finishes in spite of them starts again."""
    module, arguments, name = f"pipeline.{verb}", [], "default"
    if verb == "tune":
        arguments, name = ["--search", "short"], "short"
    output = repository.folder / "experiments" / name
    start = time.monotonic()
    repository.stage(module, *arguments)
    seconds, expected = time.monotonic() - start, hashes(output)
    moments, counts, log = random.Random(0), Counter(finished=1), len(repository.log(module))
    finished, signals = True, [signal.SIGKILL, signal.SIGTERM]
    for number in itertools.cycle(signals if verb == "train" else reversed(signals)):
        if finished:
            # Another search: its database is empty. A training always starts again.
            (repository.folder / ".gem" / "optuna.db").unlink(missing_ok=True)
            shutil.rmtree(output)
            seconds = min(seconds, time.monotonic() - start)  # the first run imports more
            start = time.monotonic()
        stage = repository.start(module, *arguments)
        if counts["interrupted"] < times:
            met = interrupt(repository, stage, number, moments.uniform(0, seconds))
            counts["inside a write"] += met and number == signal.SIGKILL
        code = stage.wait(timeout=600)
        finished = code == 0
        counts["finished" if finished else "interrupted"] += 1
        if finished:
            assert hashes(output) == expected
        else:
            assert code == (STOPPED if number == signal.SIGTERM else -number)
        if finished and counts["interrupted"] >= times:
            break
    text = repository.log(module)[log:]
    assert "Traceback" not in text and "Exception ignored" not in text, text[-3000:]
    assert double_points(repository) == []
    # A killed trial of a search whose database is gone leaves a record, of which nothing is unsent.
    records = (repository.folder / ".gem/untracked").glob("*/*/run.json")
    assert all(json.loads(record.read_bytes())["complete"] for record in records)
    if verb == "train":
        losses = query(repository, "SELECT count(*) FROM metrics WHERE key = 'train/loss'")
        assert losses == [(EPOCHS * counts["finished"],)]
    fits = {"train": {"default": 1}, "tune": {"short": 1, "short winner": 1}}[verb]
    runs = run_names(repository)
    assert {name: runs.count(name) for name in fits} == {
        name: number * counts["finished"] for name, number in fits.items()
    }
    if verb == "tune":
        assert sum(" trial=" in name for name in runs) == (5 + 2) * counts["finished"]
    record_property(
        "figure",
        f"{verb}: {counts['interrupted']} interruptions ({counts['inside a write']} of them inside "
        f"a checkpoint) of {counts['finished'] - 1} runs: same bytes, no metric twice, one MLflow "
        "run a fit",
    )


def query(repository: Repository, text: str) -> list[tuple]:
    with closing(sqlite3.connect(repository.folder / "mlflow.db")) as connection:
        return connection.execute(text).fetchall()


def double_points(repository: Repository) -> list[tuple]:
    columns = "run_uuid, key, step"
    return query(
        repository, f"SELECT {columns} FROM metrics GROUP BY {columns} HAVING count(*) > 1"
    )


def run_names(repository: Repository) -> list[str]:
    """Of all runs. Each of them has ended."""
    rows = query(repository, "SELECT name, status FROM runs")
    assert {status for _, status in rows} <= {"FINISHED", "KILLED"}, "KILLED: pruned"
    return [name for name, _ in rows]


def seconds_until_end(processes: set[int]) -> float:
    start = time.monotonic()
    until(lambda: not any(map(is_alive, processes)), seconds=30)
    return time.monotonic() - start


STAGES = ("prepare", "train", "evaluate", "synthesize", "tune")


def test_a_stage_ends_with_its_dvc_and_the_next_repro_gives_the_same_bytes(
    finished, tmp_path, times, record_property
):
    """`dvc repro` alone is killed. The next one starts at once, beside the old stage."""
    project = Repository.copy_of(finished, tmp_path / "project")
    environment = project.environment(f"sqlite:///{project.folder}/mlflow.db")
    expected, lock = outputs(project), (project.folder / "dvc.lock").read_bytes()
    moments, slowest, seconds = random.Random(0), 0.0, 10.0
    for stage in itertools.islice(itertools.cycle(STAGES), times):
        shutil.rmtree(project.folder / ".gem", ignore_errors=True)  # no trial, no checkpoint
        command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", stage]
        options = {"cwd": project.folder, "env": environment, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, **options) as dvc:
            with suppress(subprocess.TimeoutExpired):
                dvc.wait(moments.uniform(0, seconds))
            processes = descendants(dvc.pid)
            dvc.kill()
            dvc.wait()  # the locks of a process that nobody waits for remain
            killed = time.monotonic()
            with subprocess.Popen(command, **options) as following:
                slowest = max(slowest, seconds_until_end(processes))
                text, _ = following.communicate(timeout=600)
        seconds = time.monotonic() - killed
        assert following.returncode == 0, text
        assert outputs(project) == expected
        assert (project.folder / "dvc.lock").read_bytes() == lock
    assert slowest < 10
    record_property(
        "figure",
        f"{times} of {times} kills of dvc repro: same bytes; the old stage ended within "
        f"{slowest:.1f} s",
    )


def outputs(project: Repository) -> dict[str, str]:
    return {
        f"{name}/{file}": value
        for name in ("data", "experiments")
        for file, value in hashes(project.folder / name).items()
    }
