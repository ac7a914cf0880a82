"""The predictors that an evaluation compares: their fits, and their predictions of a test split.

Their table is PREDICTORS in `catalogue.py`: to add a baseline, add a row there and its fit in
`_fit_baselines`. N samples of a split, G genes. Expression is log-CPM.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pandas as pd

from pipeline.gem.common.capacity import cores
from pipeline.gem.common.config import Evaluate
from pipeline.gem.evaluation.baselines.bilinear import Bilinear, perturbation_features
from pipeline.gem.evaluation.baselines.ridge import Ridge
from pipeline.gem.evaluation.baselines.simple import (
    Additive,
    AdditiveNearest,
    MatchedMean,
    PerturbedMean,
    replicate,
    training_mean,
)
from pipeline.gem.evaluation.catalogue import PREDICTORS, REFERENCE_SUFFIX, REPLICATE
from pipeline.gem.evaluation.evaluation_split import (
    NO_REFERENCE,
    EvaluationSplit,
    EvaluationSplits,
    PredictedSplit,
)
from pipeline.gem.evaluation.metrics import randomised_pit
from pipeline.gem.evaluation.oracles import OraclePredictors
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.predictive import predictive_distribution

Predictor = Callable[[EvaluationSplit], list[PredictedSplit]]  # one, or one per training seed
Predictions = Mapping[str, list[PredictedSplit]]  # predictor name to its predictions of one split


class Predictors:
    """All predictors that a cohort allows, fitted on its visible samples; predicts a test split.

    Without controls or a known truth, the predictors that need them are absent.
    """

    def __init__(self, splits: EvaluationSplits, models: Mapping[str, list[TrainedGEM]]):
        """`models`: the trained models, one per training seed, of `gem` and of `gem_tuned`."""
        fitted = _fit_baselines(splits) | {REPLICATE: partial(_replicate, splits)}
        for name, seeds in models.items():
            fitted[name] = partial(predict_gem, seeds, splits.params, False)
            fitted[name + REFERENCE_SUFFIX] = partial(predict_gem, seeds, splits.params, True)
        self.true_change = None
        if splits.cohort.truth_folder is not None:
            oracles = OraclePredictors(splits)
            fitted |= oracles.by_name()
            self.true_change = oracles.true_change
        self.by_name: dict[str, Predictor] = {
            name: fitted[name] for name in PREDICTORS if name in fitted
        }

    def __call__(self, split: EvaluationSplit) -> dict[str, list[PredictedSplit]]:
        return {name: predict(split) for name, predict in self.by_name.items()}


def _fit_baselines(splits: EvaluationSplits) -> dict[str, Predictor]:
    """Fitted on all visible samples, with what was selected by a fit on the training split."""
    visible, profiles = splits.visible, splits.visible.profiles
    selection = visible.selection
    ridge = Ridge.fit(visible.identities, visible.equations, selection.ridge_penalty)
    fitted = {
        "training_mean": lambda samples: training_mean(profiles, len(samples)),
        "ridge": ridge.predict,
    }
    if profiles.has_both:
        additive, features = Additive(profiles), perturbation_features(splits.cohort)
        bilinear = Bilinear.fit(profiles, features, complexities=selection.bilinear)
        fitted |= {
            "no_change": additive.no_change,
            "perturbed_mean": PerturbedMean(profiles).predict,
            "matched_mean": MatchedMean(profiles).predict,
            "additive": additive.predict,
            "additive_nearest": AdditiveNearest(profiles).predict,
            "bilinear": bilinear.predict,
        }
    return {name: partial(_predict_baseline, predict) for name, predict in fitted.items()}


def _predict_baseline(
    predict: Callable[[pd.DataFrame], np.ndarray], split: EvaluationSplit
) -> list[PredictedSplit]:
    return [PredictedSplit(predict(split.samples))]


def _replicate(splits: EvaluationSplits, split: EvaluationSplit) -> list[PredictedSplit]:
    mean, draw = replicate(split.samples, split.observed, splits.data, splits.params.seed)
    if np.isnan(mean[:, 0]).all():
        return [PredictedSplit(None, reason="no condition of this split has two samples")]
    return [PredictedSplit(mean, draw=draw, uses_study_controls=True)]


def predict_gem(
    seeds: list[TrainedGEM], params: Evaluate, from_reference: bool, split: EvaluationSplit
) -> list[PredictedSplit]:
    """A prediction of each of the models, from metadata or from references."""
    if from_reference and split.reference is None:
        return [PredictedSplit(None, reason=NO_REFERENCE)] * len(seeds)

    def predict(gem: TrainedGEM) -> PredictedSplit:
        reference = split.reference if from_reference else None
        query = gem.decoder_input(split.samples, reference, unknown="missing")
        distribution = predictive_distribution(
            gem,
            query,
            split.counts,
            split.totals,
            params.prior_draws,
            params.seed,
            split.pit_genes,
        )
        rng = np.random.default_rng(params.seed)
        return PredictedSplit(
            distribution.mean,
            distribution.draw,
            randomised_pit(distribution.lower, distribution.upper, rng).clip(0, 1),
            distribution.log_likelihood,
            uses_study_controls=from_reference,
        )

    # One thread per seed rather than many per model: faster on a machine with other work.
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(predict, seeds))
