"""Runs the folds of cohorts: several at a time, resumable, tracked in MLflow.

A finished fold is a JSON file named by a hash of settings, data and code; an equal fold is not run
again. In MLflow a cohort is a run, and each of its folds a child.
"""

import json
import logging
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd

from benchmarks.cohorts.declarations import CohortTask, at_source
from benchmarks.cohorts.fold_run import run_fold
from benchmarks.cohorts.folds import Fold, draw_folds
from benchmarks.cohorts.scores import SCORES
from benchmarks.cohorts.table import SIMPLE
from benchmarks.workers import Check, Workers, worker_pool
from pipeline.gem.common.code_version import ROOT, import_closure
from pipeline.gem.common.errors import StoppedError
from pipeline.gem.common.files import sha256, sha256_of, write_json
from pipeline.gem.common.progress import duration
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.catalogue import GEM
from pipeline.gem.simulation.write import write_source
from pipeline.gem.tracking.runs import Run

log = logging.getLogger(__name__)

WORK = Path(".gem/cohorts")
STAGE = "cohorts"  # tag of the runs in MLflow
# What decides the result of a fold; tables and figures do not.
STAGES = (
    "pipeline.gem.simulation.write",
    "pipeline.gem.preparation.prepare",
    "pipeline.gem.training.multi_seed",
    "pipeline.gem.training.blend",
    "pipeline.gem.evaluation.predictors",
)
OWN = ("controls", "folds", "fold_run", "rivals", "scores", "sums")


@dataclass(frozen=True)
class FoldJob:
    """A fold, and the file of its result."""

    task: CohortTask
    fold: Fold
    result: Path

    @property
    def label(self) -> str:
        return f"{self.task.name}, {self.fold.name}"

    def read(self) -> dict:
        """The finished fold: `seconds` and `rows` of scores."""
        return json.loads(self.result.read_text(encoding="utf-8"))


@cache
def code_sha256() -> str:
    """Of the code that decides the result of a fold."""
    files = {file for module in STAGES for file in import_closure(module)}
    files |= {f"benchmarks/cohorts/{name}.py" for name in OWN}
    return sha256_of({file: sha256(ROOT / file) for file in sorted(files)})


def run_cohorts(tasks: list[CohortTask], workers: int, name: str) -> pd.DataFrame:
    """A row per cohort, fold, scale and predictor, with its scores. `name` is that of the run.

    StoppedError after a signal: finished folds are kept.
    """
    with tempfile.TemporaryDirectory() as folder, worker_pool(workers) as pool:
        tables = [_run_cohort(task, Path(folder), pool, name) for task in tasks]
    return pd.concat(tables, ignore_index=True)


def _run_cohort(task: CohortTask, folder: Path, workers: Workers, name: str) -> pd.DataFrame:
    identity = sha256_of(task.identity(), code_sha256())
    jobs = _jobs(task, identity, folder)
    missing = [job for job in jobs if not job.result.exists()]
    finished = len(jobs) - len(missing)
    log.info("%s: %d folds, of which %d were finished before", task.name, len(jobs), finished)
    identity, killed_by = sha256_of(identity, name), (StoppedError,)
    with Run.open(f"{name}/{task.name}", STAGE, identity=identity, killed_by=killed_by) as run:
        run.log_params(task.params.flat("model", "train"))
        run.set_tags({"cohort": task.name, "benchmark": name})
        run.log_dataset(task.name, sha256_of(task.identity()), "evaluation")
        for job in workers.finished(_run_job, missing):
            log.info("%s: %s", job.label, _summary(job.read(), task.scale))
        for job in jobs:
            _log_fold(job, run, sha256_of(identity, job.fold.name), name)
        table = score_table(jobs)
        means = table.groupby(["scale", "predictor"], sort=False).mean(numeric_only=True)
        run.log_metrics(_by_name(means.reset_index().to_dict("records")))
    return table


def score_table(jobs: list[FoldJob]) -> pd.DataFrame:
    """A row per fold, scale and predictor, with its scores."""
    table = pd.DataFrame(
        {"cohort": job.task.name, "fold": job.fold.name} | row
        for job in jobs
        for row in job.read()["rows"]
    )
    # A score that no fold has is None in every row.
    return table.astype({name: float for name in SCORES if name in table})


def _jobs(task: CohortTask, identity: str, folder: Path) -> list[FoldJob]:
    """The folds of a cohort. Writes the source of a simulated one below `folder`."""
    task = with_source(task, folder / task.name)
    folds = draw_folds(open_source(task.params.data).samples, task.declaration, task.params)
    results = [WORK / task.name / f"{sha256_of(identity, repr(fold))[:24]}.json" for fold in folds]
    return [FoldJob(task, fold, path) for fold, path in zip(folds, results, strict=True)]


def with_source(task: CohortTask, folder: Path) -> CohortTask:
    """The task itself, or of a simulated cohort one whose source is in `folder`, written if it is
    absent."""
    if task.declaration.synthesize is None:
        return task
    if not folder.exists():
        write_source(task.params.synthesize, folder)
    return replace(task, params=at_source(task.params, folder))


def _log_fold(job: FoldJob, parent: Run, identity: str, name: str) -> None:
    result = job.read()
    with Run.open(job.fold.name, STAGE, parent=parent.id, identity=identity) as run:
        run.set_tags({"cohort": job.task.name, "benchmark": name})
        run.log_metrics(_by_name(result["rows"]) | {"seconds": result["seconds"]})


def _by_name(rows: list[dict]) -> dict[str, float | None]:
    """`means/gem/mse`: the metrics of a run."""
    return {
        f"{row['scale']}/{row['predictor']}/{score}": value
        for row in rows
        for score, value in row.items()
        if score not in ("scale", "predictor")
    }


def _summary(result: dict, scale: str) -> str:
    mse = {row["predictor"]: row["mse"] for row in result["rows"] if row["scale"] == scale}
    simple = min((name for name in mse if name in SIMPLE), key=mse.get)
    took = duration(result["seconds"])
    return f"mse {mse[GEM]:.4f}, best simple {mse[simple]:.4f} ({simple}), in {took}"


def _run_job(job: FoldJob, check: Check) -> None:
    started, cells = time.monotonic(), job.task.declaration.cells is not None
    with tempfile.TemporaryDirectory() as folder:
        rows = run_fold(job.fold, job.task.params, cells, Path(folder), check)
    seconds = time.monotonic() - started
    write_json(job.result, {"fold": job.label, "seconds": seconds, "rows": rows})
