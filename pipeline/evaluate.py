"""Compares floors, GEM (default and tuned, from metadata and from a reference) and ceilings on every test split.

Reads   params.yaml: evaluate, tracking; data/cohort/, experiments/default/, experiments/<evaluate.study>/
Writes  experiments/evaluation/: metrics.json, metrics.csv, comparisons.csv, figures/
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
from pipeline.gem.evaluation import Evaluation, nested, score_split
from pipeline.gem.experiment import COHORT, log_context
from pipeline.gem.metrics import METRICS
from pipeline.gem.progress import duration
from pipeline.gem.storage import sha256, write_json
from pipeline.gem.tables import show_results
from pipeline.gem.trained import GEM

OUTPUT = Path("experiments/evaluation")
DEFAULT = Path("experiments/default")


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
    models = {name: GEM.load(directory) for name, directory in directories.items()}
    for model in models.values():
        model.require_genes(cohort.genes)
    scores, comparisons = evaluate(cohort, models, params)
    write_results(scores, comparisons)
    print(f"evaluate: {scores['split'].nunique()} splits, {scores['predictor'].nunique()} predictors in {duration(time.monotonic() - started)}")
    record(scores, directories, params, cohort)


def evaluate(cohort: Cohort, models: dict[str, GEM], params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    evaluation = Evaluation(cohort, params.evaluate)
    predictors = evaluation.predictors(models)
    scores, comparisons = [], []
    for scene in evaluation.scenes():
        print(f"evaluate: {scene.name}, {len(scene.samples):,} samples of {scene.condition.max() + 1} conditions", flush=True)
        of_split, between = score_split(scene, {name: predict(scene) for name, predict in predictors.items()}, params.evaluate)
        scores.append(of_split)
        comparisons.append(between)
    if not scores:
        raise InputError(f"{COHORT}: no test split; raise splits.test_random in params.yaml")
    return pd.concat(scores, ignore_index=True), pd.concat(comparisons, ignore_index=True)


def write_results(scores: pd.DataFrame, comparisons: pd.DataFrame) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT / "metrics.json", nested(scores))
    scores.to_csv(OUTPUT / "metrics.csv", index=False)
    comparisons.to_csv(OUTPUT / "comparisons.csv", index=False)
    for name, metric in METRICS.items():
        lowest = -0.5 if name == "skill" else None
        figures.split_scores(scores, name, metric.unit, metric.direction, OUTPUT / "figures" / f"{name}.png", lowest)


def record(scores: pd.DataFrame, directories: dict[str, Path], params: Params, cohort: Cohort) -> None:
    """The metrics of a model go to the run that trained it; baselines and oracles get runs beside them."""
    tracking.connect(params.tracking.experiment)
    digest = tracking.data_digest(str(COHORT), cohort.visible_sha256)
    with tracking.run("evaluate", "evaluate") as parent:
        parent.params(params.flat("evaluate"))
        parent.dataset("cohort", digest, "evaluation")
        parent.artifacts([OUTPUT / name for name in ("metrics.json", "metrics.csv", "comparisons.csv")])
        parent.artifacts(sorted((OUTPUT / "figures").glob("*.png")), "figures")
        for predictor in scores["predictor"].unique():
            if not predictor.startswith("gem"):
                with tracking.run(predictor, "evaluate", parent=parent.id) as run:
                    run.tags({tracking.PREDICTOR_TAG: predictor})
                    run.metrics(named_metrics(scores, predictor))
    for predictor, directory in directories.items():
        model_hash = sha256(directory / "model.pt")
        found = named_metrics(scores, predictor) | named_metrics(scores, f"{predictor}_reference", "reference_")
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
