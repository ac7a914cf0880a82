"""Compares floors, GEM (default and tuned, from metadata and from a reference) and ceilings on every test split.

Reads   params.yaml: evaluate, tracking (the report shows all of it); data/cohort/, experiments/default/, experiments/<evaluate.search>/
Writes  experiments/evaluation/: report.html, metrics.json, tables (*.csv), predictions/, figures/
Run     python -m pipeline.evaluate             (--show prints the table of the last evaluation)
"""

import argparse
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from pipeline.gem.common import provenance, yaml_file
from pipeline.gem.common.config import Params, flatten, read_params
from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.common.files import sha256, write_json
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.splits import TEST_CONTROL, TRAIN
from pipeline.gem.evaluation import diagnostics
from pipeline.gem.evaluation.comparison import evaluate_scene, nested, principal_axes
from pipeline.gem.evaluation.latent_table import latent_table
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.prediction_files import write_predictions
from pipeline.gem.evaluation.predictors import REFERENCE_SUFFIX, Predictors
from pipeline.gem.evaluation.report import figures
from pipeline.gem.evaluation.report.console import show_results
from pipeline.gem.evaluation.report.page import MAIN, Contents, recompute, write_report
from pipeline.gem.evaluation.report.realism import comparison_table, portrait, real_portraits
from pipeline.gem.evaluation.report.realism_figure import credibility
from pipeline.gem.evaluation.report.summary import DIRECTION, axis_of
from pipeline.gem.evaluation.test_split import EvaluationSplits
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.tracking import mlflow_client, runs
from pipeline.gem.tracking.training_run import COHORT, log_context

OUTPUT = Path("experiments/evaluation")
DEFAULT = Path("experiments/default")
TABLES = ("scores", "seeds", "comparisons", "conditions", "calibration", "regret", "latents")
FILE_OF = {name: f"{name}.csv" for name in TABLES} | {"scores": "metrics.csv"}
CREDIBILITY, REPORT = OUTPUT / "credibility.csv", OUTPUT / "report.html"
SHOWN_SECTIONS = (
    "data",
    "splits",
    "model",
    "train",
    "evaluate",
)  # of params.yaml, in the report; of a synthetic cohort also its own
UNTRAINED = ("test_random", "test_combination", TEST_CONTROL)  # samples whose latents are looked at


@dataclass(frozen=True)
class Evaluation:
    """What is written: tables by name, and what no table holds."""

    tables: dict[str, pd.DataFrame]
    seeds: dict[str, list[int]]  # model to its training seeds
    conditions: list[diagnostics.Condition]
    spreads: list[diagnostics.Spread]
    maps: list[diagnostics.LatentMap]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--show", action="store_true", help="print the results of the last evaluation"
    )
    if parser.parse_args().show:
        show()
        return
    params = read_params()
    directories = {"gem": DEFAULT, "gem_tuned": DEFAULT.parent / params.evaluate.search}
    started = time.monotonic()
    cohort = Cohort(COHORT)
    loaded = {name: TrainedGEM.load_seeds(directory) for name, directory in directories.items()}
    models, seeds = ({name: one[part] for name, one in loaded.items()} for part in (0, 1))
    learnt = MetadataEncoder.fit(cohort.rows([TRAIN]), cohort.declared.covariates, cohort.features)
    for model in (model for several in models.values() for model in several):
        model.require_genes(cohort.genes)
        model.require_vocabulary(learnt)
    # Threads that wait for one another are slow beside other work, and their number decides the last bits.
    torch.set_num_threads(1)
    with threadpool_limits(1):
        found = evaluate(cohort, models, seeds, params)
        write_results(found, cohort, params)
    scores = found.tables["scores"]
    record(scores, directories, params, cohort)
    compared = f"{scores['split'].nunique()} splits, {scores['predictor'].nunique()} predictors"
    print(f"evaluate: {compared} in {duration(time.monotonic() - started)}; open {REPORT}")


def evaluate(
    cohort: Cohort, models: dict[str, list[TrainedGEM]], seeds: dict[str, list[int]], params: Params
) -> Evaluation:
    """Everything there is to say of all test splits; writes predictions on the way."""
    scenes = EvaluationSplits(cohort, params.evaluate)
    predictors, axes = Predictors(scenes, models), principal_axes(scenes.train_expression)
    named = seeds | {f"{name}{REFERENCE_SUFFIX}": several for name, several in seeds.items()}
    results, conditions, spreads = [], [], []
    for scene in scenes:
        started = time.monotonic()
        predictions = predictors(scene)
        write_predictions(scene, predictions, named, OUTPUT / "predictions")
        result = evaluate_scene(
            scene, predictions, named, axes, predictors.true_change, params.evaluate
        )
        results.append(result)
        conditions += diagnostics.conditions(scene, predictions, result.conditions)
        spreads += diagnostics.spread(scene, predictions)
        told = f"{scene.name}, {len(scene.samples):,} samples of {scene.condition.max() + 1} conditions"
        print(f"evaluate: {told}, {duration(time.monotonic() - started)}", flush=True)
    if not results:
        raise InputError(f"{COHORT}: no test split; raise splits.test_random in params.yaml")
    tables = {
        name: pd.concat([getattr(result, name) for result in results], ignore_index=True)
        for name in TABLES[:-1]
    }
    tables["latents"], maps = latents(cohort, models, params)
    return Evaluation(tables, seeds, conditions, spreads, maps)


def latents(
    cohort: Cohort, models: dict[str, list[TrainedGEM]], params: Params
) -> tuple[pd.DataFrame, list[diagnostics.LatentMap]]:
    """What the latents of each model (the first seed's) know of samples that training never saw."""
    splits = [split for split in UNTRAINED if cohort.has(split)]
    samples, expression, seed = cohort.rows(splits), cohort.expression(splits), params.evaluate.seed
    tables = [
        latent_table(several[0], name, samples, expression, seed)
        for name, several in models.items()
    ]
    maps = [
        one
        for name, several in models.items()
        for one in diagnostics.latent_maps(
            several[0], name, samples, expression, cohort.declared, seed
        )
    ]
    return pd.concat(tables, ignore_index=True), maps


def write_results(found: Evaluation, cohort: Cohort, params: Params) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for stale in (OUTPUT / "figures").glob("*.png"):
        stale.unlink()
    scores = found.tables["scores"]
    write_json(OUTPUT / "metrics.json", nested(scores))
    for name in TABLES:
        found.tables[name].to_csv(OUTPUT / FILE_OF[name], index=False)
    for name in (axis_of(scores) if metric == "skill" else metric for metric in MAIN):
        lowest = -0.5 if name.startswith("skill") else None
        figures.split_scores(
            scores,
            name,
            METRICS[name].unit,
            DIRECTION[METRICS[name].direction],
            OUTPUT / "figures" / f"{name}.png",
            lowest,
        )
    write_report(contents(found, cohort, params, credibility_of(cohort, params)), REPORT)


def credibility_of(cohort: Cohort, params: Params) -> tuple[pd.DataFrame, Path]:
    """(table, figure): the training split beside two real cohorts, so that one sees whether a simulated one could be real."""
    rows, targets = (
        cohort.rows([TRAIN]),
        cohort.targets.rename_axis("perturbation").reset_index(name="gene_id"),
    )
    counts, totals = cohort.counts([TRAIN]), rows["total"].to_numpy()
    own = portrait(
        counts, totals, rows, cohort.genes, cohort.declared, targets, params.evaluate.seed
    )
    portraits, figure = (
        {"this cohort": own} | real_portraits(),
        OUTPUT / "figures" / "credibility.png",
    )
    table = comparison_table(portraits)
    table.to_csv(CREDIBILITY, index=False)
    credibility(portraits, figure)
    return table, figure


def contents(
    found: Evaluation, cohort: Cohort, params: Params, credible: tuple[pd.DataFrame, Path]
) -> Contents:
    """The report's content: results, and where they come from."""
    simulated = cohort.truth_folder is not None
    sections = (*(("synthesize",) if simulated else ()), *SHOWN_SECTIONS)
    split = (
        "test_combination"
        if cohort.has("test_combination")
        else found.tables["scores"]["split"].iloc[0]
    )
    return Contents(
        tables=found.tables,
        seeds=found.seeds,
        conditions=found.conditions,
        spreads=found.spreads,
        maps=found.maps,
        cohort=describe(cohort),
        origin=origin(cohort, params),
        params={
            section: {
                name.removeprefix(f"{section}."): value
                for name, value in params.flat(section).items()
            }
            for section in sections
        },
        recompute=recompute(
            cohort.folder.as_posix(), OUTPUT.as_posix(), str(split), ("ridge", *found.seeds)
        ),
        credibility=credible if simulated else None,
    )


def describe(cohort: Cohort) -> dict[str, str]:
    """The cohort in words."""
    manifest, simulated = cohort.manifest, cohort.truth_folder is not None
    kind = (
        "A synthetic cohort, whose truth is known"
        if simulated
        else "A measured cohort, whose truth nobody knows"
    )
    return {
        "summary": f"{kind}: {manifest['samples']:,} samples, {manifest['genes']:,} genes.",
        "samples by split": ", ".join(
            f"{name} {number:,}" for name, number in manifest["splits"].items()
        ),
    } | ({"notes of prepare": " ".join(manifest["notes"])} if manifest["notes"] else {})


def origin(cohort: Cohort, params: Params) -> dict[str, str]:
    """What decides the numbers, but for the parameters."""
    tags = provenance.code_tags()
    commit = tags.get("git.commit", "not under git") + (
        " with changes that are not committed" if tags.get("git.dirty") == "true" else ""
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }
    return {
        "data, hash": provenance.data_digest(str(COHORT), cohort.train_validation_sha256),
        "code, commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "threads, instruction set": f"{params.train.threads} in training, 1 in evaluation; {torch.backends.cpu.get_cpu_capability()}",
    }


def record(
    scores: pd.DataFrame, directories: dict[str, Path], params: Params, cohort: Cohort
) -> None:
    """The metrics of a model go to the run that trained it; baselines and oracles get runs beside them."""
    mlflow_client.connect(params.tracking.experiment)
    digest = provenance.data_digest(str(COHORT), cohort.train_validation_sha256)
    with runs.run("evaluate", "evaluate") as parent:
        parent.params(params.flat("evaluate"))
        parent.dataset("cohort", digest, "evaluation")
        parent.artifacts(
            [
                REPORT,
                OUTPUT / "metrics.json",
                *(OUTPUT / name for name in FILE_OF.values()),
                CREDIBILITY,
            ]
        )
        parent.artifacts(sorted((OUTPUT / "figures").glob("*.png")), "figures")
        for predictor in scores["predictor"].unique():
            if not predictor.startswith("gem"):
                with runs.run(predictor, "evaluate", parent=parent.id) as run:
                    run.tags({runs.PREDICTOR_TAG: predictor})
                    run.metrics(named_metrics(scores, predictor))
    for predictor, directory in directories.items():
        record_model(predictor, directory, scores, params, cohort)


def record_model(
    predictor: str, directory: Path, scores: pd.DataFrame, params: Params, cohort: Cohort
) -> None:
    """Adds the scores of a model to the run that made it."""
    model_hash = sha256(directory / "model.pt")
    found = named_metrics(scores, predictor) | named_metrics(
        scores, f"{predictor}{REFERENCE_SUFFIX}", "reference_"
    )
    try:
        known = runs.find_model_run(
            model_hash, predictor, "train" if directory == DEFAULT else "tune"
        )
    except mlflow_client.UNREACHABLE as error:
        if not mlflow_client.is_down(error):
            raise
        print(
            f"warning: {predictor}: its scores are in {OUTPUT}, but not in its run; `dvc repro -f -s evaluate` records them",
            file=sys.stderr,
        )
        return
    if known is None:
        # A model restored from DVC's cache may have been trained elsewhere: its run is opened anew.
        with runs.run(predictor, "evaluate") as run:
            log_context(run, params_of(directory, params), cohort)
            known = run.id
    runs.complete(known, found, {runs.MODEL_TAG: model_hash, runs.PREDICTOR_TAG: predictor})


def params_of(directory: Path, params: Params) -> Params:
    """What a model was fitted with: a search's winner has its own values for the searched keys, and every model its own sizes."""
    best = directory / "best.yaml"
    searched = flatten(yaml_file.read(best).values) if best.exists() else {}
    sizes = TrainedGEM.load(directory).params.latent.model_dump()
    return params.override(
        searched | {f"model.latent.{group}": size for group, size in sizes.items()}
    )


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
