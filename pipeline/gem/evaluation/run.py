"""An evaluation: all predictors on all test splits of a cohort, as tables and files.

    models, seeds = load_models({"gem": directory, "gem_tuned": directory}, cohort)
    evaluation = evaluate_models(cohort, models, seeds, params.evaluate, folder)
    write_tables(evaluation, folder)

Written to `folder`: metrics.json, the tables of TABLE_FILES, predictions/<split>.parquet.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.common.config import Evaluate
from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import (
    atomic_replacement,
    folder_replacement,
    write_json,
    write_table,
)
from pipeline.gem.common.progress import duration
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.splits import TEST_CONTROL, TRAIN, VISIBLE
from pipeline.gem.evaluation.catalogue import METRICS_FILE, REFERENCE_SUFFIX, TABLE_FILES
from pipeline.gem.evaluation.comparison import evaluate_split, nested_scores
from pipeline.gem.evaluation.diagnostics import (
    ConditionScatter,
    LatentMap,
    Spread,
    extreme_conditions,
    latent_maps,
    latent_table,
    spread_within_conditions,
)
from pipeline.gem.evaluation.evaluation_split import EvaluationSplit, EvaluationSplits
from pipeline.gem.evaluation.predictors import Predictions, Predictors
from pipeline.gem.model.gem import TrainedGEM

PREDICTIONS_FOLDER = "predictions"
LATENT_SPLITS = ("test_random", "test_combination", TEST_CONTROL)  # held-out samples to encode

Models = Mapping[str, list[TrainedGEM]]  # predictor to one model per training seed
Seeds = Mapping[str, list[int]]  # predictor to its training seeds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The results of all test splits."""

    tables: dict[str, pd.DataFrame]  # by the keys of TABLE_FILES
    seeds: Seeds
    conditions: list[ConditionScatter]
    spreads: list[Spread]
    maps: list[LatentMap]


def load_models(
    directories: Mapping[str, Path], cohort: Cohort
) -> tuple[dict[str, list[TrainedGEM]], dict[str, list[int]]]:
    """(models, training seeds) by predictor; IntegrityError if trained on another cohort."""
    train = cohort.rows([TRAIN])
    metadata = MetadataEncoder.fit(train, cohort.declared.covariates, cohort.features)
    extended = metadata.extended(cohort.rows(VISIBLE))
    models, seeds = {}, {}
    for name, directory in directories.items():
        models[name], seeds[name] = TrainedGEM.load_seeds(directory)
        for model in models[name]:
            model.require_genes(cohort.genes)
            model.require_vocabulary(extended if model.refit else metadata)
    return models, seeds


def evaluate_models(
    cohort: Cohort, models: Models, seeds: Seeds, params: Evaluate, folder: Path
) -> Evaluation:
    """Evaluates models, baselines and ceilings on every test split, and writes the predictions.

    Raises InputError for a cohort without a test split. The number of threads of BLAS and torch
    changes the last digits: set both to 1 before.
    """
    splits = EvaluationSplits(cohort, params)
    predictors, axes = Predictors(splits, models), splits.visible.axes
    all_seeds = {**seeds, **{name + REFERENCE_SUFFIX: numbers for name, numbers in seeds.items()}}
    results, conditions, spreads = [], [], []

    def evaluate(split: EvaluationSplit, folder: Path) -> None:
        """A function of its own: the predictions of one split at a time are in memory."""
        started = time.monotonic()
        predictions = predictors(split)
        write_predictions(split, predictions, all_seeds, folder)
        result = evaluate_split(split, predictions, all_seeds, axes, predictors.true_change, params)
        results.append(result)
        conditions.extend(extreme_conditions(split, predictions, result.conditions))
        spreads.append(spread_within_conditions(split, predictions))
        _log.info(
            "evaluate: %s, %s samples of %d conditions, %s",
            split.name,
            f"{len(split.samples):,}",
            split.condition.max() + 1,
            duration(time.monotonic() - started),
        )

    with folder_replacement(folder / PREDICTIONS_FOLDER) as temporary:
        for split in splits:
            evaluate(split, temporary)
        if not results:
            raise InputError(
                f"{cohort.folder}: no test split; raise splits.test_random in params.yaml"
            )
    tables = {
        name: pd.concat([getattr(result, name) for result in results], ignore_index=True)
        for name in TABLE_FILES
        if name != "latents"
    }
    tables["latents"], maps = _evaluate_latents(cohort, models, params)
    spreads = [spread for spread in spreads if spread is not None]
    return Evaluation(tables, seeds, conditions, spreads, maps)


def _evaluate_latents(
    cohort: Cohort, models: Models, params: Evaluate
) -> tuple[pd.DataFrame, list[LatentMap]]:
    """The latents of the first training seed of each model, on the first `params.split_samples`
    held-out samples in the cohort's order, which is random."""
    splits = [name for name in LATENT_SPLITS if cohort.has(name)]
    rows = cohort.rows(splits)
    chosen, samples = np.arange(len(rows)) < params.split_samples, rows.head(params.split_samples)
    expression = log_cpm(cohort.counts(splits, chosen), samples["total"].to_numpy())
    tables, maps = [], []
    for name, (gem, *_) in models.items():
        tables.append(latent_table(gem, name, samples, expression, params.seed))
        maps += latent_maps(gem, name, samples, expression, cohort.declared, params.seed)
    return pd.concat(tables, ignore_index=True), maps


def write_tables(evaluation: Evaluation, folder: Path) -> None:
    """Writes metrics.json and the tables of TABLE_FILES."""
    write_json(folder / METRICS_FILE, nested_scores(evaluation.tables["scores"]))
    for name, file in TABLE_FILES.items():
        write_table(folder / file, evaluation.tables[name])


def write_predictions(
    split: EvaluationSplit, predictions: Predictions, seeds: Seeds, folder: Path
) -> None:
    """Writes <split>.parquet, from which any score can be recomputed without this code.

    Columns: `sample_id`, `condition`, then per predictor a list of log-CPM in the cohort's gene
    order; of a model one column per training seed, `gem:1`, `gem:2`. A predictor without a
    prediction has no column.
    """
    columns = {
        "sample_id": pa.array(split.samples["sample_id"]),
        "condition": pa.array(split.condition_name),
    }
    for name, predicted in predictions.items():
        labels = [f"{name}:{seed}" for seed in seeds[name]] if name in seeds else [name]
        for label, of_seed in zip(labels, predicted, strict=True):
            if of_seed.values is not None:
                values = np.ascontiguousarray(of_seed.values, dtype=np.float32)
                columns[label] = pa.FixedSizeListArray.from_arrays(
                    pa.array(values.reshape(-1)), values.shape[1]
                )
    with atomic_replacement(folder / f"{split.name}.parquet") as temporary:
        pq.write_table(
            pa.table(columns),
            temporary,
            compression="lz4",
            use_dictionary=["condition"],
        )
