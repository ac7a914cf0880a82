"""Inner folds of cohorts under several settings: GEM, its network alone, its mixed model alone.

A finished fold is a JSON file named by a hash of settings, data and code; an equal fold is not run
again.
"""

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.cohorts.declarations import CohortTask
from benchmarks.cohorts.fold_run import HeldOut, train
from benchmarks.cohorts.folds import Fold, inner_folds
from benchmarks.cohorts.run import code_sha256, with_source
from benchmarks.workers import Check, worker_pool
from pipeline.gem.common.code_version import ROOT
from pipeline.gem.common.config import Data, Params
from pipeline.gem.common.files import sha256, sha256_of, write_atomically, write_json
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.catalogue import GEM
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.predictors import predict_gem
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.preparation.prepare import write_cohort

log = logging.getLogger(__name__)

WORK = Path(".gem/settings")
NETWORK, MIXED = "network", "mixed_model"  # the parts of GEM, each alone
PARTS = (GEM, NETWORK, MIXED)


@dataclass(frozen=True)
class SettingJob:
    """A fold under a setting, and the file of its result."""

    setting: str
    cohort: str
    fold: Fold
    params: Params  # of the cohort and the setting
    cells: bool
    genes: int | None  # drawn at random
    result: Path

    @property
    def label(self) -> str:
        return f"{self.setting}, {self.cohort}, {self.fold.name}"

    def rows(self) -> list[dict]:
        """`scale`, `predictor` (one of PARTS) and scores of the finished fold."""
        place = {"setting": self.setting, "cohort": self.cohort, "fold": self.fold.name}
        return [place | row for row in json.loads(self.result.read_text("utf-8"))["rows"]]


def run_settings(
    tasks: list[CohortTask], settings: Mapping[str, Mapping], workers: int, genes: int | None
) -> pd.DataFrame:
    """A row per setting, cohort, fold, scale and part of GEM, with its scores. `settings`: name to
    changes. The n-th fold of a cohort is trained with seed n under each. StoppedError after a
    signal: finished folds are kept."""
    with tempfile.TemporaryDirectory() as folder, worker_pool(workers) as pool:
        tasks = [with_source(task, Path(folder) / task.name) for task in tasks]
        folds = [
            inner_folds(open_source(task.params.data).samples, task.declaration, task.params)
            for task in tasks
        ]
        jobs = [
            _job(setting, changes, task, fold, number, genes)
            for setting, changes in settings.items()
            for task, of_task in zip(tasks, folds, strict=True)
            for number, fold in enumerate(of_task, 1)
        ]
        missing = [job for job in jobs if not job.result.exists()]
        log.info(
            "settings: %d fits, of which %d were finished before",
            len(jobs),
            len(jobs) - len(missing),
        )
        for number, job in enumerate(pool.finished(_run_job, missing), 1):
            own = {row["predictor"]: row["mse"] for row in job.rows()}
            text = ", ".join(f"{name} {own[name]:.4f}" for name in PARTS)
            log.info("%d of %d: %s: mse %s", number, len(missing), job.label, text)
    return pd.DataFrame(row for job in jobs for row in job.rows())


def _job(
    setting: str, changes: Mapping, task: CohortTask, fold: Fold, seed: int, genes: int | None
) -> SettingJob:
    params = task.params.override({**changes, "train.seeds": [seed]})
    identity = replace(task, params=params).identity()
    name = sha256_of(identity, repr(fold), genes, _code_sha256())[:24]
    cells = task.declaration.cells is not None
    path = WORK / task.name / f"{name}.json"
    return SettingJob(setting, task.name, fold, params, cells, genes, path)


@cache
def _code_sha256() -> str:
    return sha256_of(code_sha256(), sha256(ROOT / "benchmarks/settings/inner_run.py"))


def _run_job(job: SettingJob, check: Check) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_inner_fold(job, Path(folder), check)
    write_json(job.result, {"fold": job.label, "seconds": time.monotonic() - start, "rows": rows})


def run_inner_fold(job: SettingJob, folder: Path, check: Check) -> list[dict]:
    """Rows of `scale`, `predictor` (one of PARTS) and scores. Writes the cohort below `folder`."""
    params = job.fold.params(job.params)
    source = open_source(params.data)
    data = _with_genes(params.data, source.genes["gene_id"], job.genes, params.splits.seed, folder)
    write_cohort(source, data, params.splits, folder / "cohort")
    cohort = Cohort(folder / "cohort")
    check()
    (gem,) = train(cohort, params, check)
    split = EvaluationSplits(cohort, params.evaluate).split(job.fold.split)
    held_out = HeldOut(cohort, split, job.fold.excluded)
    parts = parts_of(gem)
    predicted = {name: predict_gem([part], params.evaluate, False, split) for name, part in parts}
    rows = [row for row in held_out.scores_of_means(predicted) if row["predictor"] in PARTS]
    if job.cells:
        for name, part in parts:
            sums = held_out.scores_of_sums({}, [part])
            rows += [row | {"predictor": name} for row in sums if row["predictor"] == GEM]
    return rows


def parts_of(gem: TrainedGEM) -> list[tuple[str, TrainedGEM]]:
    """GEM and its parts by name: one without a mixed model is its network."""
    parts = [(GEM, gem), (NETWORK, replace(gem, mixed=None, network_weight=1.0))]
    return [*parts, (MIXED, replace(gem, network_weight=0.0) if gem.mixed else gem)]


def _with_genes(data: Data, genes: pd.Series, number: int | None, seed: int, folder: Path) -> Data:
    """With a list of `number` genes, drawn at random: their mean error is that of all genes."""
    if number is None or number >= len(genes) or data.gene_list is not None:
        return data
    chosen = np.random.default_rng(seed).choice(np.sort(genes.astype(str)), number, replace=False)
    path = folder / "drawn_genes.txt"
    write_atomically(path, "\n".join(chosen).encode("utf-8") + b"\n")
    return data.model_copy(update={"gene_list": str(path)})
