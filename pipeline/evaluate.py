"""Compares baselines, GEM (default and tuned, from metadata and from a reference) and ceilings on
every test split. A search whose winner is the default model adds no second copy of it.

Reads   params.yaml (all of it: the report shows it); data/cohort/; experiments/default/ and
        experiments/<evaluate.search>/
Writes  experiments/evaluation/: report.html, metrics.json, tables (*.csv), predictions/, figures/;
        the metrics to MLflow
Run     python -m pipeline.evaluate
"""

import argparse
import logging
import time
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from pipeline.gem.common import provenance, yaml_file
from pipeline.gem.common.capacity import evaluation_needs, require
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.common.files import sha256, sha256_of
from pipeline.gem.common.processes import exclusive
from pipeline.gem.common.progress import duration
from pipeline.gem.common.yaml_file import flatten
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.catalogue import (
    BIASED,
    EXPERIMENTS,
    METRICS_FILE,
    MODELS,
    OUTPUT,
    REFERENCE_SUFFIX,
    TABLE_FILES,
    TUNED,
    is_biased,
)
from pipeline.gem.evaluation.report.contents import report_data
from pipeline.gem.evaluation.report.figures import draw_figures
from pipeline.gem.evaluation.report.landscape import Landscape
from pipeline.gem.evaluation.report.page import write_report
from pipeline.gem.evaluation.run import evaluate_models, load_models, write_tables
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.model_file import MODEL_FILE
from pipeline.gem.tracking import mlflow_client, runs
from pipeline.gem.tracking.runs import COHORT, PREDICTOR_TAG, Run

log = logging.getLogger(__name__)

FIGURES, REPORT = OUTPUT / "figures", OUTPUT / "report.html"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    params = read_params()
    with exclusive("evaluate", f"{OUTPUT} is being written by {{process}}; wait for it"):
        evaluate(params)


def evaluate(params: Params) -> None:
    started = time.monotonic()
    mlflow_client.connect(params.tracking.experiment)
    cohort = Cohort(COHORT)
    require(evaluation_needs(cohort.manifest), params)
    search = EXPERIMENTS / params.evaluate.search
    directories = {"gem": EXPERIMENTS / "default", TUNED: search}
    models, seeds = load_models(directories, cohort)
    if model_hashes(search) == model_hashes(directories["gem"]):
        for by_name in (directories, models, seeds):
            del by_name[TUNED]
        log.info("evaluate: the winner of search %s is the default model", search.name)
    # More threads are slower beside other work, and their number changes the last digits.
    torch.set_num_threads(1)
    with threadpool_limits(1):
        evaluation = evaluate_models(cohort, models, seeds, params.evaluate, OUTPUT)
    scores = evaluation.tables["scores"]
    write_tables(evaluation, OUTPUT)
    draw_figures(scores, FIGURES)
    landscape = Landscape.read(search)
    write_report(report_data(evaluation, cohort, params, OUTPUT, landscape), REPORT)
    log_evaluation(scores, params, cohort)
    for name, directory in directories.items():
        fitted = fitted_params(directory, models[name][0], params)
        log_model_scores(name, directory, fitted, scores, cohort)
    size = f"{scores['split'].nunique()} splits, {scores['predictor'].nunique()} predictors"
    log.info("evaluate: %s in %s; open %s", size, duration(time.monotonic() - started), REPORT)


def model_hashes(directory: Path) -> dict[str, str]:
    """The hash of each model file in a model directory, which equal models share."""
    files = [directory / MODEL_FILE, *sorted((directory / "seeds").iterdir())]
    return {path.name: sha256(path) for path in files}


def log_evaluation(scores: pd.DataFrame, params: Params, cohort: Cohort) -> None:
    """Logs a run with all files, and a child run per baseline and ceiling."""
    files = [REPORT, OUTPUT / METRICS_FILE, *(OUTPUT / name for name in TABLE_FILES.values())]
    digest = provenance.data_digest(str(COHORT), cohort.train_validation_sha256)
    # A killed evaluation of the same models and data has written the same scores.
    identity = sha256_of("evaluate", params.flat("evaluate"), sha256(OUTPUT / METRICS_FILE))
    with Run.open("evaluate", "evaluate", identity=identity) as parent:
        parent.log_params(params.flat("evaluate"))
        parent.log_dataset("cohort", digest, "evaluation")
        parent.log_artifacts(files)
        parent.log_artifacts(sorted(FIGURES.glob("*.png")), "figures")
        for predictor in scores["predictor"].unique():
            if predictor not in MODELS:
                child = f"{identity} {predictor}"
                with Run.open(predictor, "evaluate", parent=parent.id, identity=child) as run:
                    run.set_tags(
                        {PREDICTOR_TAG: predictor} | bias_tag(run_biases(scores, predictor))
                    )
                    run.log_metrics(run_metrics(scores, predictor))


def log_model_scores(
    name: str, directory: Path, params: Params, scores: pd.DataFrame, cohort: Cohort
) -> None:
    """Adds the scores of a model to the run that trained it."""
    model = (sha256(directory / MODEL_FILE), name, "train" if name == "gem" else "tune")
    metrics, biased = {}, []
    for predictor, prefix in ((name, ""), (name + REFERENCE_SUFFIX, "reference_")):
        metrics |= run_metrics(scores, predictor, prefix)
        biased += run_biases(scores, predictor, prefix)
    runs.log_scores(model, params, cohort, metrics, bias_tag(biased))


def fitted_params(directory: Path, model: TrainedGEM, params: Params) -> Params:
    """`params` with the values of a search's winner and the latent sizes of the model."""
    best = directory / "best.yaml"
    searched = flatten(yaml_file.read(best).values) if best.exists() else {}
    sizes = model.params.latent.model_dump()
    return params.override(
        searched | {f"model.latent.{group}": size for group, size in sizes.items()}
    )


def run_metrics(scores: pd.DataFrame, predictor: str, prefix: str = "") -> dict[str, float]:
    """`test_random/skill`, or `test_random/reference_skill`: the same names in every run."""
    rows = scores[(scores["predictor"] == predictor) & scores["value"].notna()]
    return {f"{row.split}/{prefix}{row.metric}": row.value for row in rows.itertuples()}


def run_biases(scores: pd.DataFrame, predictor: str, prefix: str = "") -> list[str]:
    """The biased ones of `run_metrics`."""
    rows = scores[scores["predictor"] == predictor].itertuples()
    return [f"{row.split}/{prefix}{row.metric}" for row in rows if is_biased(row.value, row.reason)]


def bias_tag(names: list[str]) -> dict[str, str]:
    """A tag of a run that names its biased metrics, if there are any."""
    return {BIASED: ", ".join(names)} if names else {}


if __name__ == "__main__":
    exit_with(main)
