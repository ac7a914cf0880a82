"""The evaluation of a cohort, shared by tests, and splits made by hand."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.bootstrap import Bootstrap, MetricDraws, Score
from pipeline.gem.evaluation.comparison import (
    SplitResult,
    evaluate_split,
    is_complete,
    sample_errors,
)
from pipeline.gem.evaluation.evaluation_split import (
    Controls,
    EvaluationSplit,
    EvaluationSplits,
    PredictedSplit,
)
from pipeline.gem.evaluation.predictors import Predictors
from pipeline.gem.evaluation.scoring import measure, score
from pipeline.gem.evaluation.split_context import SplitContext, TrueChange
from pipeline.gem.model.gem import TrainedGEM

SPLITS = ("test_random", "test_combination", "test_perturbation", "test_study")
SEEDS = {"gem": [1, 2], "gem_reference": [1, 2], "gem_tuned": [1], "gem_tuned_reference": [1]}
Predictions = dict[str, list[PredictedSplit]]


@dataclass(frozen=True)
class CohortEvaluation:
    """A cohort, its test splits, and the predictions of every predictor."""

    params: Params
    cohort: Cohort
    splits: EvaluationSplits
    predictors: Predictors
    models: dict[str, list[TrainedGEM]]
    axes: np.ndarray
    by_split: dict[str, tuple[EvaluationSplit, Predictions]]

    @classmethod
    def of(cls, cohort: Cohort, params: Params, models: dict) -> "CohortEvaluation":
        splits = EvaluationSplits(cohort, params.evaluate)
        predictors, axes = Predictors(splits, models), splits.visible.axes
        by_split = {split.name: (split, predictors(split)) for split in splits}
        return cls(params, cohort, splits, predictors, models, axes, by_split)

    def result(
        self,
        name: str,
        predictions: Predictions | None = None,
        split: EvaluationSplit | None = None,
        seeds: dict | None = None,
    ) -> SplitResult:
        return evaluate_split(
            split or self.by_split[name][0],
            predictions or self.by_split[name][1],
            SEEDS if seeds is None else seeds,
            self.axes,
            self.predictors.true_change,
            self.params.evaluate,
        )

    def measure(self, name: str, predicted: PredictedSplit) -> dict[str, MetricDraws]:
        split, predictions = self.by_split[name]
        context = split_context(split, predictions, self.axes, self.predictors.true_change, 12)
        return measure(predicted, context)


def rows_of(
    split: EvaluationSplit, predictions: Predictions, rows: np.ndarray
) -> tuple[EvaluationSplit, Predictions]:
    """These rows of a split and of its predictions; conditions and entities are numbered anew."""

    def select(value):
        if isinstance(value, Controls):
            mean, number, group = value.mean[rows], value.number[rows], value.group[rows]
            return replace(value, mean=mean, number=number, group=group)
        if isinstance(value, pd.DataFrame):
            return value.iloc[rows]
        return value[rows] if isinstance(value, np.ndarray) else value

    def select_fields(record):
        selected = {field.name: select(getattr(record, field.name)) for field in fields(record)}
        return replace(record, **selected)

    split = select_fields(split)
    split = replace(
        split,
        condition=np.unique(split.condition, return_inverse=True)[1],
        entity=np.unique(split.entity, return_inverse=True)[1],
    )
    selected = {name: [*map(select_fields, seeds)] for name, seeds in predictions.items()}
    return split, selected


def simple_split(
    observed: np.ndarray, condition: np.ndarray, control: np.ndarray | None = None, **changes
) -> EvaluationSplit:
    """A split of one context in which every sample is treated.

    Every other one of `control` (m, G) is on the observed side, the rest on the predicted side.
    """
    number = len(observed)
    names = np.array([f"c{index}" for index in condition], dtype=object)
    sides = None, None
    if control is not None:
        sides = simple_controls(control[::2], number), simple_controls(control[1::2], number)
    split = EvaluationSplit(
        name="test_random",
        samples=pd.DataFrame({"sample_id": [f"s{row}" for row in range(number)], "total": 1e6}),
        counts=np.zeros(observed.shape, dtype=int),
        observed=observed,
        reference=None,
        reference_samples=None,
        observed_control=sides[0],
        predicted_control=sides[1],
        shared_control=False,
        reference_control=sides[1],
        context=np.full(number, "x", dtype=object),
        study=np.full(number, "", dtype=object),
        perturbation=names,
        pair=names,
        condition_name=names,
        perturbed_centroid=None,
        target=np.full((number, 1), -1),
        condition=condition,
        entity=condition,
        entity_kind="condition",
        treated=np.ones(number, dtype=bool),
    )
    return replace(split, **changes)


def simple_controls(control: np.ndarray, number: int) -> Controls:
    """The same controls (m, G) for each of `number` samples."""
    mean = np.broadcast_to(control.mean(axis=0), (number, control.shape[1]))
    size, group = np.full(number, len(control)), np.zeros(number, dtype=int)
    return Controls(mean, size, group, {"x": control.std(axis=0, ddof=1)}, {"x": len(control) - 1})


def split_context(
    split: EvaluationSplit,
    predictions: Predictions | None = None,
    axes: np.ndarray | None = None,
    true_change: TrueChange | None = None,
    draws: int = 20,
) -> SplitContext:
    errors = {
        name: sample_errors(split, seeds)
        for name, seeds in (predictions or {}).items()
        if is_complete(seeds)
    }
    axes = np.eye(split.observed.shape[1]) if axes is None else axes
    return SplitContext(split, Bootstrap(split.condition, draws, 0), axes, errors, true_change)


def scores(split: EvaluationSplit, predicted: PredictedSplit, **options) -> dict[str, Score]:
    """Metric to the score of one prediction; `options` as in `split_context`."""
    context = split_context(split, **options)
    draws = measure(predicted, context)
    return {name: score([metric], context.resamples) for name, metric in draws.items()}
