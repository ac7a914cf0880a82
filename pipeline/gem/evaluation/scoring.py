"""All metrics of one prediction of a test split, on its samples and on every bootstrap resample.

N samples, G genes, C conditions, T treated conditions, R resamples. Expression is log-CPM.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.bootstrap import Bootstrap, MetricDraws, Score
from pipeline.gem.evaluation.catalogue import (
    REPLICATE,
    SHARED_CONTROLS,
    SKILL_BASELINE,
    SKILL_CEILING,
)
from pipeline.gem.evaluation.differential_expression import de_direction, de_jaccard
from pipeline.gem.evaluation.evaluation_split import Controls, PredictedSplit
from pipeline.gem.evaluation.split_context import (
    MIN_TEST_SAMPLES,
    SplitContext,
    changes,
    condition_delta_pearson,
    differential_genes_by_condition,
)

# Metrics of two changes from a control; of observed and predicted genes, if the truth is unknown.
_CHANGES, _GENE_SETS = ("delta_pearson", "discrimination"), ("de_direction", "de_jaccard")

# Reasons of a metric without a value.
NO_DISTRIBUTION = "predicts a mean, not a distribution"
NO_PROBABILITY = "has no probability of whole samples"
BEYOND_METADATA = "1 is the ideal predictor from metadata; a sample of the same study can tell more"
NO_CONTROLS = "no control of the same context"
NO_REPLICATES = "no treated condition has two samples that are predicted"
NOT_TESTED = f"no condition and its controls have the {MIN_TEST_SAMPLES} samples each of a test"


class _Undefined(Exception):
    """A metric has no value; the message is the reason."""


def measure(predicted: PredictedSplit, context: SplitContext) -> dict[str, MetricDraws]:
    """Every metric of METRICS, in its order."""
    if predicted.values is None:
        return dict.fromkeys(metrics.METRICS, MetricDraws.null(predicted.reason))
    measurement, draws = _Measurement(predicted, context), {}
    if not measurement.covered.any():
        return dict.fromkeys(metrics.METRICS, MetricDraws.null("no sample is predicted"))
    for name in metrics.METRICS:
        try:
            draws[name] = getattr(measurement, name)()
        except _Undefined as reason:
            draws[name] = MetricDraws.null(str(reason))
    if context.split.shared_control:
        for name in _CHANGES if context.true_change else (*_CHANGES, *_GENE_SETS):
            if draws[name].values is not None:
                draws[name] = replace(draws[name], reason=SHARED_CONTROLS)
    return draws


def score(seeds: list[MetricDraws], resamples: Bootstrap) -> Score:
    """The mean over training seeds with its interval; null if it is null for one of them."""
    missing = [draws.reason for draws in seeds if draws.values is None]
    if len(missing) == len(seeds):
        return Score.null(missing[0])
    if missing:
        return Score.null(f"of {len(missing)} of {len(seeds)} training seeds: {missing[0]}")
    mean = np.mean([draws.values for draws in seeds], axis=0)
    result = resamples.score(mean, min(draws.conditions for draws in seeds))
    return replace(result, reason="; ".join(filter(None, (result.reason, seeds[0].reason))))


class _Measurement:
    """One method per metric of METRICS, which raises _Undefined if the metric has no value."""

    def __init__(self, predicted: PredictedSplit, context: SplitContext):
        self.predicted, self.context, self.split = predicted, context, context.split
        self.observed, self.values = context.split.observed, predicted.values
        self.covered = np.isfinite(predicted.values[:, 0])  # (N,) bool, which are predicted

    # --- levels

    @cached_property
    def error(self) -> np.ndarray:
        return metrics.squared_error(self.observed, self.values)

    def mse(self) -> MetricDraws:
        return self._with_coverage(self.context.over_samples(self.error))

    def mae(self) -> MetricDraws:
        error = metrics.absolute_error(self.observed, self.values)
        return self._with_coverage(self.context.over_samples(error))

    def skill(self) -> MetricDraws:
        if SKILL_CEILING not in self.context.errors:
            raise _Undefined("the truth of this cohort is not known: there is no oracle")
        draws = self._share_of_gap(SKILL_CEILING)
        if self.predicted.uses_study_controls:
            return replace(draws, reason=BEYOND_METADATA)
        return self._with_coverage(draws)

    def skill_replicate(self) -> MetricDraws:
        if REPLICATE not in self.context.errors:
            raise _Undefined("no condition has a replicate")
        return self._with_coverage(self._share_of_gap(REPLICATE))

    def _share_of_gap(self, ceiling: str) -> MetricDraws:
        """Skill on the samples that all predict; undefined unless the ceiling is clearly better
        than the baseline: a share of a gap that may be zero means nothing."""
        errors = self.error, self.context.errors[SKILL_BASELINE], self.context.errors[ceiling]
        rows = np.isfinite(errors[0]) & np.isfinite(errors[2])
        if not rows.any():
            raise _Undefined("no sample is predicted by both")
        own, baseline, ideal = (
            self.context.over_samples(np.where(rows, values, np.nan)) for values in errors
        )
        gap = self.context.resamples.score(baseline.values - ideal.values, baseline.conditions)
        if gap.low is None or gap.low <= 0:
            raise _Undefined(
                f"{ceiling} is not clearly better than {SKILL_BASELINE} on these samples"
            )
        skill = metrics.skill(own.values, baseline.values, ideal.values)
        return MetricDraws(skill, own.conditions)

    def sample_pearson(self) -> MetricDraws:
        values = np.full(len(self.covered), np.nan)
        values[self.covered] = metrics.sample_pearson(*self._covered_rows())
        if np.isnan(values[self.covered]).any():
            raise _Undefined("a sample is predicted, or observed, constant over genes")
        return self._with_coverage(self.context.over_samples(values))

    def gene_pearson(self) -> MetricDraws:
        resamples, (observed, values) = self.context.resamples, self._covered_rows()
        if self.covered.all():
            moments = self.context.observed_moments
        else:
            resamples = resamples.of_rows(self.covered)
            moments = metrics.GeneMoments(observed, resamples)
        draws = metrics.gene_pearson(moments, values)
        if not np.isfinite(draws[0]):
            raise _Undefined("every gene is predicted constant over the samples")
        return self._with_coverage(MetricDraws(draws, len(np.unique(resamples.condition))))

    def _covered_rows(self) -> tuple[np.ndarray, np.ndarray]:
        if self.covered.all():
            return self.observed, self.values
        return self.observed[self.covered], self.values[self.covered]

    def _with_coverage(self, draws: MetricDraws) -> MetricDraws:
        """With a note if not all samples are predicted."""
        if self.covered.all():
            return draws
        number, all_samples = int(self.covered.sum()), len(self.covered)
        return replace(draws, reason=f"on the {number} of {all_samples} samples that it predicts")

    # --- changes

    def _require_treated(self) -> None:
        if not self.split.treated.any():
            raise _Undefined("no treated sample in this split")
        if not self.covered[self.split.treated].any():
            raise _Undefined("no treated sample is predicted")

    @cached_property
    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        self._require_treated()
        pair = changes(self.predicted, self.context)
        if pair is None:
            raise _Undefined(NO_CONTROLS)
        return pair

    def delta_pearson(self) -> MetricDraws:
        observed, predicted = self.changes
        if np.nanmax(np.abs(predicted)) <= metrics.ROUNDING:
            raise _Undefined("no change is predicted in any condition")
        values = condition_delta_pearson(observed, predicted)
        self.context.deltas[id(self.predicted)] = values
        return self.context.over_conditions(values)

    def delta_pearson_systema(self) -> MetricDraws:
        self._require_treated()
        centroid = self.split.perturbed_centroid
        if centroid is None:
            raise _Undefined("training has no perturbation, or no control is declared")
        centre = self.context.mean_of_all(centroid, self.covered)
        observed = self.context.mean_of_all(self.observed, self.covered) - centre
        predicted = self.context.mean(self.values, self.covered) - centre
        return self.context.over_conditions(condition_delta_pearson(observed, predicted))

    def discrimination(self) -> MetricDraws:
        observed, predicted = self.changes
        valid = np.isfinite(predicted[:, 0])
        if valid.sum() < 2:
            raise _Undefined("fewer than two treated conditions")
        values = np.full(len(valid), np.nan)
        values[valid] = metrics.discrimination(observed[valid], predicted[valid])
        return self.context.over_conditions(values)

    def de_direction(self) -> MetricDraws:
        self._require_treated()
        control = self._control_of_effects()
        valid = self.covered & np.isfinite(control.mean[:, 0])
        predicted = self.context.mean(self.values, valid)
        predicted -= self.context.mean_of_all(control.mean, valid)
        values = np.full(len(predicted), np.nan)
        for index, (genes, true_change) in enumerate(zip(*self.context.effects, strict=True)):
            if genes is not None and np.isfinite(predicted[index, 0]):
                values[index] = de_direction(genes, true_change, predicted[index])
        return self._over_gene_sets(values, "no condition has a differential gene")

    def de_jaccard(self) -> MetricDraws:
        self._require_treated()
        draw, control = self._draw(), self._control_of_effects()
        predicted = differential_genes_by_condition(draw, control, self.context)
        values = np.full(len(predicted), np.nan)
        for index, (genes, own) in enumerate(zip(self.context.effects[0], predicted, strict=True)):
            if genes is not None and own is not None:
                values[index] = de_jaccard(genes, own)
        reason = f"no condition with {MIN_TEST_SAMPLES} drawn samples has a differential gene"
        return self._over_gene_sets(values, reason)

    def _control_of_effects(self) -> Controls:
        control = self.split.control_of(self.predicted)
        if control is None or self.context.effects is None:
            raise _Undefined(NO_CONTROLS)
        return control

    def _over_gene_sets(self, values: np.ndarray, reason: str) -> MetricDraws:
        if all(genes is None for genes in self.context.effects[0]):
            reason = NOT_TESTED
        return self._over_conditions(values, reason)

    def _over_conditions(self, values: np.ndarray, reason: str) -> MetricDraws:
        """The mean of values (T,); undefined for this reason if all are NaN."""
        if not np.isfinite(values).any():
            raise _Undefined(reason)
        return self.context.over_conditions(values)

    def target_bias(self) -> MetricDraws:
        if (self.split.target < 0).all():
            raise _Undefined("no sample's perturbation has a known target gene")
        values = metrics.target_bias(self.observed, self.values, self.split.target)
        if not np.isfinite(values).any():
            raise _Undefined("no sample with a target gene is predicted")
        return self.context.over_samples(values)

    # --- distributions

    def _draw(self) -> np.ndarray:
        if self.predicted.draw is None:
            raise _Undefined(NO_DISTRIBUTION)
        return self.predicted.draw

    def calibration(self) -> MetricDraws:
        if self.predicted.pit is None:
            raise _Undefined(NO_DISTRIBUTION)
        histogram = metrics.pit_histogram(self.predicted.pit, self.split.condition)
        weights = self.context.resamples.weights
        return MetricDraws(metrics.calibration(histogram, weights), len(histogram))

    def count_log_likelihood(self) -> MetricDraws:
        if self.predicted.log_likelihood is None:
            raise _Undefined(NO_DISTRIBUTION if self.predicted.pit is None else NO_PROBABILITY)
        return self.context.over_samples(self.predicted.log_likelihood)

    def e_distance(self) -> MetricDraws:
        draws_or_mean = self.values if self.predicted.draw is None else self.predicted.draw
        valid = np.isfinite(draws_or_mean[:, 0])
        if not valid.all():
            draws_or_mean = np.where(valid[:, None], draws_or_mean, 0)
        predicted = draws_or_mean @ self.context.axes
        return self._over_rows(
            metrics.e_distance, predicted, self.context.observed_projection, valid
        )

    def spread_pearson(self) -> MetricDraws:
        draw = self._draw()
        valid = np.isfinite(draw[:, 0])
        return self._over_rows(metrics.spread_pearson, self.observed, draw, valid)

    def _over_rows(
        self, metric: Callable, first: np.ndarray, second: np.ndarray, valid: np.ndarray
    ) -> MetricDraws:
        """Of a metric of two sets of samples, on the valid (N,) rows of each condition."""
        values = [
            metric(first[rows], second[rows])
            for rows in (every[valid[every]] for every in self.context.rows)
        ]
        return self._over_conditions(np.array(values, dtype=float), NO_REPLICATES)
