"""One fold: prepare, train, predict and score, by the code of the stages.

n samples of a condition, G genes. Expression is log-CPM.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.cohorts.controls import matched_controls
from benchmarks.cohorts.folds import Fold
from benchmarks.cohorts.rivals import rival_predictions
from benchmarks.cohorts.scores import (
    Scores,
    condition_scores,
    half_scores,
    log_cpm_of_sum,
    mean_scores,
)
from benchmarks.cohorts.sums import by_condition, summed_predictions, summed_rivals
from benchmarks.workers import Check
from pipeline.gem.common.config import Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import VISIBLE
from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.catalogue import GEM, REFERENCE_SUFFIX, REPLICATE
from pipeline.gem.evaluation.evaluation_split import (
    EvaluationSplit,
    EvaluationSplits,
    PredictedSplit,
)
from pipeline.gem.evaluation.predictors import Predictors
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.query import decode
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.training import distributed
from pipeline.gem.training.blend import blend_with_mixed_model
from pipeline.gem.training.dataset import TrainingData, resolve_observation
from pipeline.gem.training.expression import memory_for_counts
from pipeline.gem.training.multi_seed import fit_and_refit

log = logging.getLogger(__name__)

HALF = "half"  # one half of a condition's samples predicted by the other
MEANS, SUMS = "means", "sums"  # over the samples of a condition: of log-CPM; of counts


def run_fold(fold: Fold, params: Params, cells: bool, folder: Path, check: Check) -> list[dict]:
    """Rows of `scale`, `predictor` and scores. Writes the cohort of the fold below `folder`."""
    params = fold.params(params)
    source = open_source(params.data)
    write_cohort(source, params.data, params.splits, folder / "cohort")
    cohort = Cohort(folder / "cohort")
    check()
    models = train(cohort, params, check)
    splits = EvaluationSplits(cohort, params.evaluate)
    split = splits.split(fold.split)
    held_out = HeldOut(cohort, split)
    predictors = Predictors(splits, {GEM: models})
    rows = held_out.scores_of_means(predictors(split))
    if not cells:
        return rows
    summed = summed_predictions(source, cohort, params.data, params.splits, params.evaluate, folder)
    sums = summed[0].split(fold.split)
    simple = by_condition(sums, summed[1]) | summed_rivals(summed[0].cohort, sums)
    return rows + held_out.scores_of_sums(simple, models)


def train(cohort: Cohort, params: Params, check: Check) -> list[TrainedGEM]:
    """The models that the stage `train` makes, one per seed of `params`."""
    device = distributed.choose_device(params.train)
    memory = memory_for_counts(params.train.memory_share, device)
    params = resolve_observation(params, cohort)
    data = TrainingData.load(cohort, device, params.model.uses_counts, memory)
    params = data.resolve(params)
    seeds = params.train.seeds
    fits = [fit_and_refit(data, params, cohort, seed, on_step=check) for seed in seeds]
    return [each.gem for each in blend_with_mixed_model(fits, data, cohort)]


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of a fold, and the controls of their contexts."""

    cohort: Cohort
    split: EvaluationSplit
    excluded: tuple[dict[str, str], ...] = ()  # values of columns of samples that are not scored

    @cached_property
    def conditions(self) -> dict[str, np.ndarray]:
        """Name of each treated condition to its rows in the split."""
        scored = self.split.treated.copy()
        for mapping in self.excluded:
            texts = [label_texts(self.split.samples[name]) == mapping[name] for name in mapping]
            scored &= ~np.logical_and.reduce(texts)
        codes = np.where(scored, self.split.condition, -1)
        rows = [np.flatnonzero(codes == code) for code in np.unique(codes[codes >= 0])]
        return {self.split.condition_name[each[0]]: each for each in rows}

    @cached_property
    def _visible(self) -> list[str]:
        return [name for name in VISIBLE if self.cohort.has(name)]

    @cached_property
    def visible(self) -> pd.DataFrame:
        """All samples but the held-out ones. That some of them validate must not move a score."""
        return self.cohort.rows(self._visible)

    @cached_property
    def _samples(self) -> dict[str, pd.DataFrame]:
        """Of each condition."""
        return {name: self.split.samples.iloc[rows] for name, rows in self.conditions.items()}

    @cached_property
    def controls(self) -> dict[str, np.ndarray]:
        """Condition to the rows of its controls among the visible samples; may be empty."""
        first = self.split.samples.iloc[[rows[0] for rows in self.conditions.values()]]
        matched = matched_controls(first, self.visible, self.cohort.declared)
        return dict(zip(self.conditions, matched, strict=True))

    @cached_property
    def _control_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(visible row of each control, their counts (n, G))."""
        used = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.controls.values()]))
        chosen = np.zeros(len(self.visible), dtype=bool)
        chosen[used] = True
        return used, self.cohort.counts(self._visible, chosen)

    def scores_of_means(self, predictions: Mapping[str, list[PredictedSplit]]) -> list[dict]:
        """Of the mean log-CPM of each condition."""
        used, counts = self._control_counts
        totals = self.visible["total"].to_numpy()

        def control(rows: np.ndarray) -> np.ndarray:
            inside, size = np.searchsorted(used, rows), totals[rows][:, None]
            return np.log1p(counts[inside] * (1e6 / size)).mean(axis=0)

        controls = {
            name: control(rows) if len(rows) else None for name, rows in self.controls.items()
        }
        observed = self.split.observed
        result = []
        for name, of_seeds in predictions.items():
            if name == REPLICATE:  # `half` is of conditions
                continue
            rows = [
                self._condition_scores(seed, controls)
                for seed in of_seeds
                if seed.values is not None
            ]
            if rows:
                result.append({"scale": MEANS, "predictor": name} | mean_scores(rows))
        for name, predicted in rival_predictions(self.cohort, self._samples).items():
            rows = [
                condition_scores(observed[rows].mean(axis=0), predicted[key], controls[key])
                for key, rows in self.conditions.items()
            ]
            result.append({"scale": MEANS, "predictor": name} | mean_scores(rows))
        halves = self._halves(observed, controls, lambda part: part.mean(axis=0))
        return result + ([{"scale": MEANS, "predictor": HALF} | halves] if halves else [])

    def _condition_scores(self, predicted: PredictedSplit, controls: dict) -> Scores:
        scores = mean_scores(
            condition_scores(
                self.split.observed[rows].mean(axis=0),
                predicted.values[rows].mean(axis=0),
                controls[name],
            )
            for name, rows in self.conditions.items()
        )
        if predicted.pit is None:
            return scores
        treated = np.concatenate(list(self.conditions.values()))
        histogram = metrics.pit_histogram(predicted.pit[treated], np.zeros(len(treated), dtype=int))
        return scores | {"calibration": float(metrics.calibration(histogram, np.ones((1, 1)))[0])}

    def _halves(self, samples: np.ndarray, controls: dict, combine: Callable) -> Scores | None:
        rng = np.random.default_rng(0)
        found = (
            half_scores(samples[rows], controls[name], combine, rng)
            for name, rows in self.conditions.items()
        )
        found = [scores for scores in found if scores is not None]
        return mean_scores(found) if found else None

    def scores_of_sums(
        self, simple: Mapping[str, Mapping[str, np.ndarray]], models: list[TrainedGEM]
    ) -> list[dict]:
        """Of the log-CPM of the summed counts of each condition: `simple` predictors by condition,
        and the expected counts of the models."""
        used, control_counts = self._control_counts
        control_totals = self.visible["total"].to_numpy()
        controls, observed = {}, {}
        for name, rows in self.controls.items():
            inside = np.searchsorted(used, rows)
            sums = control_counts[inside], control_totals[rows]
            controls[name] = log_cpm_of_sum(*sums) if len(rows) else None
        for name, rows in self.conditions.items():
            observed[name] = log_cpm_of_sum(self.split.counts[rows], self.split.totals[rows])
        result = []
        for name, predicted in self._summed(simple, models):
            rows = [
                mean_scores(
                    condition_scores(observed[key], of_seed[key], controls[key]) for key in observed
                )
                for of_seed in predicted
            ]
            result.append({"scale": SUMS, "predictor": name} | mean_scores(rows))
        counts = np.column_stack([self.split.counts, self.split.totals])
        halves = self._halves(
            counts, controls, lambda part: log_cpm_of_sum(part[:, :-1], part[:, -1])
        )
        return result + ([{"scale": SUMS, "predictor": HALF} | halves] if halves else [])

    def _summed(
        self, simple: Mapping[str, Mapping[str, np.ndarray]], models: list[TrainedGEM]
    ) -> Iterable[tuple[str, list[Mapping[str, np.ndarray]]]]:
        """(predictor, condition to log-CPM (G,) of the sum, per seed)."""
        for name, predicted in simple.items():
            yield name, [predicted]
        references = {GEM: None}
        if self.split.reference is not None:
            references[GEM + REFERENCE_SUFFIX] = self.split.reference
        for name, reference in references.items():
            yield name, [self._expected_sums(gem, reference) for gem in models]

    def _expected_sums(self, gem: TrainedGEM, reference: np.ndarray | None) -> dict:
        """Condition to log-CPM (G,) of the sum of expected counts, as `predict` gives them."""
        samples, totals = self.split.samples, self.split.totals
        result = {}
        for name, rows in self.conditions.items():
            own = None if reference is None else reference[rows]
            fractions = expected_fractions(gem, samples.iloc[rows], own)
            expected = fractions * (self.kept_share * totals[rows])[:, None]
            result[name] = log_cpm_of_sum(expected, totals[rows])
        return result

    @cached_property
    def kept_share(self) -> float:
        """The share of the counts of training samples that the genes of the cohort have: models
        divide counts among these genes, log-CPM are relative to all genes of the source."""
        kept = sum(int(block.sum(dtype=np.int64)) for block in self.cohort.blocks(self._visible))
        return kept / int(self.visible["total"].sum())


@torch.no_grad()
def expected_fractions(
    gem: TrainedGEM, samples: pd.DataFrame, reference: np.ndarray | None
) -> np.ndarray:
    """(n, G) expected fractions of the counts, decoded at the mean of the latents."""
    query = gem.decoder_input(samples, reference, unknown="missing")
    decoded = decode(gem.network, query, query.latents.mean)
    return gem.network.observation.fractions(decoded).cpu().numpy().astype(np.float64)
