"""The comparison of predictors on the tiny cohort, made once for all tests, and scenes made by hand."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
import torch

from pipeline.gem.common.config import Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.comparison import (
    Result,
    evaluate_scene,
    principal_axes,
    sample_errors,
    usable,
)
from pipeline.gem.evaluation.predictors import Prediction, Predictors
from pipeline.gem.evaluation.scoring import SplitContext, TrueChange, measure, score
from pipeline.gem.evaluation.test_split import Controls, EvaluationSplit, EvaluationSplits
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

SEEDS = {"gem": [1, 2], "gem_reference": [1, 2], "gem_tuned": [1], "gem_tuned_reference": [1]}
Said = dict[str, list[Prediction]]


@dataclass(frozen=True)
class World:
    """A cohort, its scenes, and what every predictor says of them."""

    params: Params
    cohort: Cohort
    scenes: EvaluationSplits
    predictors: Predictors
    axes: np.ndarray
    by_split: dict[str, tuple[EvaluationSplit, Said]]

    @classmethod
    def of(cls, cohort: Cohort, params: Params, models: dict) -> "World":
        scenes = EvaluationSplits(cohort, params.evaluate)
        predictors = Predictors(scenes, models)
        axes = principal_axes(scenes.train_expression)
        return cls(
            params,
            cohort,
            scenes,
            predictors,
            axes,
            {scene.name: (scene, predictors(scene)) for scene in scenes},
        )

    def result(
        self,
        split: str,
        said: Said | None = None,
        scene: EvaluationSplit | None = None,
        seeds: dict | None = None,
    ) -> Result:
        own = self.by_split[split]
        seeds = SEEDS if seeds is None else seeds
        return evaluate_scene(
            scene or own[0],
            said or own[1],
            seeds,
            self.axes,
            self.predictors.true_change,
            self.params.evaluate,
        )


_made: dict = {}


def world_of(cohort: Cohort, params: Params) -> World:
    """The same for every test file."""
    if cohort.folder not in _made:
        data = TrainingData.load(cohort, torch.device("cpu"))
        first, second = (fit(data, params, seed=seed).gem for seed in (1, 2))
        _made[cohort.folder] = World.of(
            cohort, params, {"gem": [first, second], "gem_tuned": [second]}
        )
    return _made[cohort.folder]


def rows_of(scene: EvaluationSplit, said: Said, rows: np.ndarray) -> tuple[EvaluationSplit, Said]:
    """The same of some samples, or in another order; conditions and entities numbered anew."""

    def moved(value):
        if isinstance(value, Controls):
            return replace(
                value, mean=value.mean[rows], number=value.number[rows], group=value.group[rows]
            )
        if isinstance(value, pd.DataFrame):
            return value.iloc[rows]
        return value[rows] if isinstance(value, np.ndarray) else value

    changed = {field.name: moved(getattr(scene, field.name)) for field in fields(scene)}
    changed |= {
        name: np.unique(changed[name], return_inverse=True)[1] for name in ("condition", "entity")
    }
    parts = {
        name: [
            replace(
                one,
                **{
                    part: moved(getattr(one, part))
                    for part in ("values", "drawn", "pit", "log_likelihood")
                },
            )
            for one in several
        ]
        for name, several in said.items()
    }
    return replace(scene, **changed), parts


def made_scene(
    observed: np.ndarray, condition: np.ndarray, control: np.ndarray | None = None, **changes
) -> EvaluationSplit:
    """A scene of one context, every sample treated; `control` (m, G) are split in two: the first half for the observed side."""
    number = len(observed)
    names = np.array([f"c{index}" for index in condition], dtype=object)
    sides = (
        (None, None)
        if control is None
        else (made_controls(control[::2], number), made_controls(control[1::2], number))
    )
    samples = pd.DataFrame({"sample_id": [f"s{row}" for row in range(number)], "total": 1e6})
    scene = EvaluationSplit(
        name="test_random",
        samples=samples,
        counts=np.zeros(observed.shape, dtype=int),
        observed=observed,
        reference=None,
        reference_samples=None,
        observed_control=sides[0],
        predicted_control=sides[1],
        reference_control=sides[1],
        context=np.full(number, "x", dtype=object),
        study=np.full(number, "", dtype=object),
        perturbation=names,
        pair=names,
        condition_name=names,
        perturbed_centre=None,
        target=np.full(number, -1),
        condition=condition,
        entity=condition,
        entity_kind="condition",
        treated=np.ones(number, dtype=bool),
    )
    return replace(scene, **changes)


def made_controls(control: np.ndarray, number: int) -> Controls:
    mean = np.broadcast_to(control.mean(axis=0), (number, control.shape[1]))
    same = np.zeros(number, dtype=int)
    return Controls(
        mean, same + len(control), same, {"x": control.std(axis=0, ddof=1)}, {"x": len(control) - 1}
    )


def truths(
    scene: EvaluationSplit,
    said: Said | None = None,
    axes: np.ndarray | None = None,
    true_change: TrueChange | None = None,
    draws: int = 20,
) -> SplitContext:
    errors = {
        name: sample_errors(scene, several)
        for name, several in (said or {}).items()
        if usable(several)
    }
    axes = np.eye(scene.observed.shape[1]) if axes is None else axes
    return SplitContext(scene, Bootstrap(scene.condition, draws, 0), axes, errors, true_change)


def scores(scene: EvaluationSplit, prediction: Prediction, **about) -> dict:
    """Metric to Score of one prediction."""
    known = truths(scene, **about)
    return {name: score([one], known.resamples) for name, one in measure(prediction, known).items()}
