"""Compares floors, GEM (default and tuned, from metadata and from a reference) and ceilings on every test split.

Reads   params.yaml: evaluate, tracking; data/cohort/, experiments/default/, experiments/<evaluate.study>/
Writes  experiments/evaluation/: metrics.json, tables (*.csv), predictions/, figures/, report.html
Run     python -m pipeline.evaluate             (--show prints the table of the last evaluation)
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from pipeline.gem import figures, tracking, yamlfile
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import Params, flatten, read_params
from pipeline.gem.errors import InputError, exit_with
from pipeline.gem.evaluation import evaluate_scene, nested, principal_axes
from pipeline.gem.experiment import COHORT, load_seeds, log_context
from pipeline.gem.latents import latent_table
from pipeline.gem.metrics import METRICS
from pipeline.gem.prediction_files import write_predictions
from pipeline.gem.predictors import REFERENCE_SUFFIX, Predictors
from pipeline.gem.progress import duration
from pipeline.gem.scenes import Scenes
from pipeline.gem.splits import TEST_CONTROL
from pipeline.gem.storage import sha256, write_json
from pipeline.gem.tables import show_results
from pipeline.gem.trained import GEM

OUTPUT = Path("experiments/evaluation")
DEFAULT = Path("experiments/default")
TABLES = ("scores", "seeds", "comparisons", "conditions", "calibration", "regret", "latents")
FILE_OF = {name: f"{name}.csv" for name in TABLES} | {"scores": "metrics.csv"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the results of the last evaluation")
    if parser.parse_args().show:
        show()
        return
    params = read_params()
    directories = {"gem": DEFAULT, "gem_tuned": DEFAULT.parent / params.evaluate.study}
    started = time.monotonic()
    cohort = Cohort(COHORT)
    loaded = {name: load_seeds(directory) for name, directory in directories.items()}
    models, seeds = ({name: one[part] for name, one in loaded.items()} for part in (0, 1))
    for model in (model for several in models.values() for model in several):
        model.require_genes(cohort.genes)
    tables = evaluate(cohort, models, seeds, params)
    write_results(tables)
    scores = tables["scores"]
    print(f"evaluate: {scores['split'].nunique()} splits, {scores['predictor'].nunique()} predictors in {duration(time.monotonic() - started)}")
    record(scores, directories, params, cohort)


def evaluate(cohort: Cohort, models: dict[str, list[GEM]], seeds: dict[str, list[int]], params: Params) -> dict[str, pd.DataFrame]:
    """Table to its rows over all test splits, the names as in TABLES; writes predictions on the way."""
    scenes = Scenes(cohort, params.evaluate)
    predictors, axes = Predictors(scenes, models), principal_axes(scenes.train_expression)
    named = seeds | {f"{name}{REFERENCE_SUFFIX}": several for name, several in seeds.items()}
    results = []
    for scene in scenes:
        started = time.monotonic()
        predictions = predictors(scene)
        write_predictions(scene, predictions, named, OUTPUT / "predictions")
        results.append(evaluate_scene(scene, predictions, named, axes, predictors.true_change, params.evaluate))
        told = f"{scene.name}, {len(scene.samples):,} samples of {scene.condition.max() + 1} conditions"
        print(f"evaluate: {told}, {duration(time.monotonic() - started)}", flush=True)
    if not results:
        raise InputError(f"{COHORT}: no test split; raise splits.test_random in params.yaml")
    tables = {name: pd.concat([getattr(result, name) for result in results], ignore_index=True) for name in TABLES[:-1]}
    return tables | {"latents": latents(cohort, models, params)}


def latents(cohort: Cohort, models: dict[str, list[GEM]], params: Params) -> pd.DataFrame:
    """What the latents of each model (the first seed's) know of samples that training never saw."""
    splits = [split for split in ("test_random", "test_combination", TEST_CONTROL) if cohort.has(split)]
    samples, expression = cohort.rows(splits), cohort.expression(splits)
    tables = [latent_table(several[0], name, samples, expression, params.evaluate.seed) for name, several in models.items()]
    return pd.concat(tables, ignore_index=True)


def write_results(tables: dict[str, pd.DataFrame]) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT / "metrics.json", nested(tables["scores"]))
    for name in TABLES:
        tables[name].to_csv(OUTPUT / FILE_OF[name], index=False)
    for name, metric in METRICS.items():
        lowest = -0.5 if name.startswith("skill") else None
        figures.split_scores(tables["scores"], name, metric.unit, metric.direction, OUTPUT / "figures" / f"{name}.png", lowest)


def record(scores: pd.DataFrame, directories: dict[str, Path], params: Params, cohort: Cohort) -> None:
    """The metrics of a model go to the run that trained it; baselines and oracles get runs beside them."""
    tracking.connect(params.tracking.experiment)
    digest = tracking.data_digest(str(COHORT), cohort.visible_sha256)
    with tracking.run("evaluate", "evaluate") as parent:
        parent.params(params.flat("evaluate"))
        parent.dataset("cohort", digest, "evaluation")
        parent.artifacts([OUTPUT / name for name in ("metrics.json", *FILE_OF.values())])
        parent.artifacts(sorted((OUTPUT / "figures").glob("*.png")), "figures")
        for predictor in scores["predictor"].unique():
            if not predictor.startswith("gem"):
                with tracking.run(predictor, "evaluate", parent=parent.id) as run:
                    run.tags({tracking.PREDICTOR_TAG: predictor})
                    run.metrics(named_metrics(scores, predictor))
    for predictor, directory in directories.items():
        model_hash = sha256(directory / "model.pt")
        found = named_metrics(scores, predictor) | named_metrics(scores, f"{predictor}{REFERENCE_SUFFIX}", "reference_")
        known = tracking.find_model_run(model_hash, predictor, "train" if directory == DEFAULT else "tune")
        if known is None:
            # A model restored from DVC's cache may have been trained elsewhere: its run is opened anew.
            with tracking.run(predictor, "evaluate") as run:
                log_context(run, params_of(directory, params), cohort)
                known = run.id
        tracking.complete(known, found, {tracking.MODEL_TAG: model_hash, tracking.PREDICTOR_TAG: predictor})


def params_of(directory: Path, params: Params) -> Params:
    """What a model was fitted with: a search's winner has its own values for the searched keys."""
    best = directory / "best.yaml"
    return params.override(flatten(yamlfile.read(best).values)) if best.exists() else params


def named_metrics(scores: pd.DataFrame, predictor: str, prefix: str = "") -> dict[str, float]:
    """`test_random/skill`, or `test_random/reference_skill`: the same names for every predictor's run."""
    rows = scores[(scores["predictor"] == predictor) & scores["value"].notna()]
    return {f"{row.split}/{prefix}{row.metric}": row.value for row in rows.itertuples()}


def show() -> None:
    for name in ("metrics.csv", "comparisons.csv"):
        if not (OUTPUT / name).exists():
            raise InputError(f"{OUTPUT / name}: absent; `dvc repro` writes it")
    show_results(pd.read_csv(OUTPUT / "metrics.csv"), pd.read_csv(OUTPUT / "comparisons.csv"))


if __name__ == "__main__":
    exit_with(main)
