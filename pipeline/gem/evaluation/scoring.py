"""All metrics of one prediction on one scene, as values on the samples themselves and on every bootstrap resample.

N samples, G genes, C conditions, R resamples. Expression is log-CPM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.bootstrap import Bootstrap, Score, condition_sums
from pipeline.gem.evaluation.differential_expression import changed_genes, de_direction, de_jaccard
from pipeline.gem.evaluation.predictors import Prediction
from pipeline.gem.evaluation.test_split import Controls, EvaluationSplit

BASELINE, CEILING, REPLICATE = "ridge", "oracle_metadata", "replicate"
COMPONENTS = 50  # of the training expression, for energy distances
TESTABLE = 4  # samples at least on either side: Welch's test of two or three against many controls finds small variances, not genes

TrueChange = Callable[
    [EvaluationSplit], tuple[np.ndarray, np.ndarray]
]  # (N, G) bool which genes each sample's perturbation changes, and by how much

NO_DISTRIBUTION = "predicts a mean, not a distribution"
NO_PROBABILITY = "the probability of whole samples is not worked out for it"
NO_CONTROLS = "no two disjoint sets of controls of the same context"
NOTHING_SAID = "nothing is said of any treated sample"
UNTESTED = f"no condition and its controls have {TESTABLE} samples each: differential genes cannot be found"


@dataclass(frozen=True)
class MetricDraws:
    """One metric: (R + 1,) values, the first on the samples themselves; or None with a reason."""

    values: np.ndarray | None
    conditions: int = 0
    reason: str = ""

    @classmethod
    def null(cls, reason: str) -> "MetricDraws":
        return cls(None, reason=reason)


@dataclass(frozen=True)
class SplitContext:
    """What of a scene is the same for every predictor, worked out once. Changes are means over the samples of a condition."""

    scene: EvaluationSplit
    resamples: Bootstrap
    axes: np.ndarray  # (G, D) principal axes of the training expression
    errors: Mapping[
        str, np.ndarray
    ]  # predictor to (N,) squared error, mean over genes and over seeds
    true_change: TrueChange | None  # where the truth is known

    @cached_property
    def conditions(self) -> np.ndarray:
        """(T,) indices of the treated conditions."""
        return np.unique(self.scene.condition[self.scene.treated])

    @cached_property
    def condition(self) -> np.ndarray:
        """(n,) position of each treated sample among them."""
        return np.searchsorted(self.conditions, self.scene.condition[self.scene.treated])

    @cached_property
    def effects(self) -> tuple[list[np.ndarray | None], np.ndarray] | None:
        """((T) of (G,) bool which genes change, (T, G) by how much): in truth, else as Welch's test finds. None without controls.

        A set is None where there are too few samples to find it.
        """
        everything, control = (
            np.ones(len(self.scene.treated), dtype=bool),
            self.scene.observed_control,
        )
        if self.true_change is not None:
            changed, change = (
                self.mean(values, everything) for values in self.true_change(self.scene)
            )
            return list(changed >= 0.5), change
        if control is None:
            return None
        change = self.scene.observed - control.mean
        return differential(self.scene.observed, control, self), self.mean(
            change, np.isfinite(change[:, 0])
        )

    def mean(self, values: np.ndarray, given: np.ndarray) -> np.ndarray:
        """(T, G) of per-sample values (N, G), over the samples of each treated condition that are given (N,); NaN rows without one."""
        number = len(self.conditions)
        rows = given[self.scene.treated]
        kept, condition = values[self.scene.treated][rows], self.condition[rows]
        counts = np.bincount(condition, minlength=number)[:, None]
        return np.divide(
            condition_sums(kept, condition, number),
            counts,
            out=np.full((number, values.shape[1]), np.nan),
            where=counts > 0,
        )

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Rows of each treated condition."""
        rows = np.flatnonzero(self.scene.treated)
        order = np.argsort(self.condition, kind="stable")
        ends = np.cumsum(np.bincount(self.condition, minlength=len(self.conditions)))
        return [rows[order[start:end]] for start, end in zip([0, *ends], ends, strict=False)]

    def over_treated(self, values: np.ndarray) -> MetricDraws:
        """From values (T,) of the treated conditions, NaN where one has none."""
        spread = np.full(self.resamples.number, np.nan)
        spread[self.conditions] = values
        return MetricDraws(self.resamples.condition_mean(spread), int(np.isfinite(values).sum()))

    def over_samples(self, values: np.ndarray) -> MetricDraws:
        """From per-sample values (N,), NaN where a sample has none."""
        given = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.resamples.sums(np.where(given, values, 0.0)) / self.resamples.sums(
                given.astype(float)
            )
        return MetricDraws(found, len(np.unique(self.scene.condition[given])))


def measure(said: Prediction, truths: SplitContext) -> dict[str, MetricDraws]:
    """Every metric of METRICS, in its order."""
    if said.values is None:
        return {name: MetricDraws.null(said.reason) for name in metrics.METRICS}
    if np.isnan(said.values[:, 0]).all():
        return {name: MetricDraws.null("nothing is said of any sample") for name in metrics.METRICS}
    found = _levels(said, truths) | _changes(said, truths) | _distributions(said, truths)
    found["target_bias"] = _target_bias(said, truths)
    return {name: found[name] for name in metrics.METRICS}


def score(measured: list[MetricDraws], resamples: Bootstrap) -> Score:
    """The mean over training seeds, with the interval over conditions; null where it is for one of them."""
    missing = [one.reason for one in measured if one.values is None]
    if missing:
        return Score.null(
            missing[0]
            if len(missing) == len(measured)
            else f"of {len(missing)} of {len(measured)} training seeds: {missing[0]}"
        )
    found = resamples.score(
        np.mean([one.values for one in measured], axis=0), min(one.conditions for one in measured)
    )
    return replace(found, reason=found.reason or measured[0].reason)


# --- levels -----------------------------------------------------------------------------------------------------------


def _levels(said: Prediction, truths: SplitContext) -> dict[str, MetricDraws]:
    observed, predicted = truths.scene.observed, said.values
    covered = np.isfinite(predicted[:, 0])
    note = (
        ""
        if covered.all()
        else f"on the {int(covered.sum())} of {len(covered)} samples that it predicts"
    )
    error = metrics.squared_error(observed, predicted)
    found = {
        "mse": truths.over_samples(error),
        "mae": truths.over_samples(metrics.absolute_error(observed, predicted)),
        "skill": _skill(error, CEILING, said, truths),
        "skill_replicate": _skill(error, REPLICATE, said, truths),
        "sample_pearson": _sample_pearson(observed[covered], predicted[covered], covered, truths),
        "gene_pearson": _gene_pearson(observed[covered], predicted[covered], covered, truths),
    }
    return {
        name: one if one.values is None or one.reason else replace(one, reason=note)
        for name, one in found.items()
    }


def _skill(error: np.ndarray, ideal: str, said: Prediction, truths: SplitContext) -> MetricDraws:
    """Null where there is no ideal, or where it is not clearly better than the baseline: a share of nothing says nothing."""
    if ideal not in truths.errors:
        return MetricDraws.null(
            "the truth of this cohort is not known: there is no oracle"
            if ideal == CEILING
            else "no condition has a replicate"
        )
    # All three on the samples that all three predict.
    rows = np.isfinite(error) & np.isfinite(truths.errors[ideal])
    if not rows.any():
        return MetricDraws.null("no sample is predicted by both")
    means = [
        truths.over_samples(np.where(rows, one, np.nan))
        for one in (error, truths.errors[BASELINE], truths.errors[ideal])
    ]
    gap = truths.resamples.score(means[1].values - means[2].values, means[1].conditions)
    if gap.low is None or gap.low <= 0:
        return MetricDraws.null(f"{ideal} is not clearly better than {BASELINE} on these samples")
    reason = (
        "1 is the ideal predictor from metadata; a sample of the same study can tell more"
        if said.uses_study_controls and ideal == CEILING
        else ""
    )
    return MetricDraws(metrics.skill(*(one.values for one in means)), means[0].conditions, reason)


def _sample_pearson(
    observed: np.ndarray, predicted: np.ndarray, covered: np.ndarray, truths: SplitContext
) -> MetricDraws:
    values = np.full(len(covered), np.nan)
    values[covered] = metrics.sample_pearson(observed, predicted)
    if np.isnan(values[covered]).any():
        return MetricDraws.null("a sample is predicted, or observed, constant over genes")
    return truths.over_samples(values)


def _gene_pearson(
    observed: np.ndarray, predicted: np.ndarray, covered: np.ndarray, truths: SplitContext
) -> MetricDraws:
    resamples = truths.resamples.of_rows(covered)
    values = metrics.gene_pearson(observed, predicted, resamples)
    if not np.isfinite(values[0]):
        return MetricDraws.null("every gene is predicted constant over the samples")
    return MetricDraws(values, len(np.unique(resamples.condition)))


# --- changes ----------------------------------------------------------------------------------------------------------


def own_control(said: Prediction, scene: EvaluationSplit) -> Controls | None:
    """A change is from controls that the predictor knew: one without the new study's effect would else carry its negative."""
    return scene.reference_control if said.uses_study_controls else scene.predicted_control


def changes(said: Prediction, truths: SplitContext) -> tuple[np.ndarray, np.ndarray] | None:
    """((T, G) observed, (T, G) predicted) change from control of the treated conditions, over the samples that are predicted.

    NaN rows where nothing is said of a condition, or a side has no control for it; None where that is so of all.
    """
    observed, own = truths.scene.observed_control, own_control(said, truths.scene)
    if not len(truths.conditions) or observed is None or own is None:
        return None
    sides = truths.scene.observed - observed.mean, said.values - own.mean
    given = np.isfinite(sides[0][:, 0]) & np.isfinite(sides[1][:, 0])
    return (
        tuple(truths.mean(side, given) for side in sides)
        if given[truths.scene.treated].any()
        else None
    )


def _changes(said: Prediction, truths: SplitContext) -> dict[str, MetricDraws]:
    names = (
        "delta_pearson",
        "delta_pearson_systema",
        "discrimination",
        "de_direction",
        "de_jaccard",
    )
    treated = truths.scene.treated
    if not treated.any():
        return dict.fromkeys(names, MetricDraws.null("no treated sample in this split"))
    if np.isnan(said.values[treated, 0]).all():
        return dict.fromkeys(names, MetricDraws.null(NOTHING_SAID))
    pair = changes(said, truths)
    return {
        "delta_pearson": MetricDraws.null(NO_CONTROLS) if pair is None else _delta(*pair, truths),
        "delta_pearson_systema": _systema(said, truths),
        "discrimination": MetricDraws.null(NO_CONTROLS)
        if pair is None
        else _discrimination(*pair, truths),
        "de_direction": _direction(said, truths),
        "de_jaccard": _jaccard(said, truths),
    }


def delta_values(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(T,) NaN where nothing is said. A condition without predicted change tells nothing of its direction: correlation 0."""
    values = metrics.delta_pearson(np.nan_to_num(observed), np.nan_to_num(predicted))
    return np.where(np.isfinite(predicted[:, 0]), np.nan_to_num(values), np.nan)


def _delta(observed: np.ndarray, predicted: np.ndarray, truths: SplitContext) -> MetricDraws:
    if np.nanmax(np.abs(predicted)) <= metrics.ROUNDING:
        return MetricDraws.null("no change is predicted in any condition")
    return truths.over_treated(delta_values(observed, predicted))


def _systema(said: Prediction, truths: SplitContext) -> MetricDraws:
    centre = truths.scene.perturbed_centre
    if centre is None:
        return MetricDraws.null(
            "training has no perturbation, or no control is declared that tells which samples are perturbed"
        )
    given = np.isfinite(said.values[:, 0])
    return truths.over_treated(
        delta_values(
            *(truths.mean(side - centre, given) for side in (truths.scene.observed, said.values))
        )
    )


def _discrimination(
    observed: np.ndarray, predicted: np.ndarray, truths: SplitContext
) -> MetricDraws:
    said = np.isfinite(predicted[:, 0])
    if said.sum() < 2:
        return MetricDraws.null("fewer than two treated conditions")
    values = np.full(len(said), np.nan)
    values[said] = metrics.discrimination(observed[said], predicted[said])
    return truths.over_treated(values)


def _direction(said: Prediction, truths: SplitContext) -> MetricDraws:
    own = own_control(said, truths.scene)
    if own is None or truths.effects is None:
        return MetricDraws.null(NO_CONTROLS)
    change = said.values - own.mean
    predicted = truths.mean(change, np.isfinite(change[:, 0]))
    values = [
        np.nan if genes is None or np.isnan(row[0]) else de_direction(genes, true, row)
        for genes, true, row in zip(*truths.effects, predicted, strict=True)
    ]
    return _of_sets(values, truths, "no condition has a differential gene")


def _jaccard(said: Prediction, truths: SplitContext) -> MetricDraws:
    if said.drawn is None:
        return MetricDraws.null(NO_DISTRIBUTION)
    own = own_control(said, truths.scene)
    if own is None or truths.effects is None:
        return MetricDraws.null(NO_CONTROLS)
    pairs = zip(truths.effects[0], differential(said.drawn, own, truths), strict=True)
    values = [
        np.nan if real is None or found is None else de_jaccard(real, found)
        for real, found in pairs
    ]
    return _of_sets(
        values,
        truths,
        f"no condition of which {TESTABLE} samples are drawn has a differential gene, true or found",
    )


def differential(
    values: np.ndarray, control: Controls, truths: SplitContext
) -> list[np.ndarray | None]:
    """For each treated condition the genes (G,) bool that Welch's test finds to differ between its samples, of values (N, G),
    and their controls; None with fewer than TESTABLE samples on a side."""
    found: list[np.ndarray | None] = []
    for rows in truths.groups:
        rows = rows[np.isfinite(values[rows, 0]) & np.isfinite(control.mean[rows, 0])]
        freedom = control.freedom.get(truths.scene.context[rows[0]], 0) if len(rows) else 0
        if len(rows) < TESTABLE or freedom < TESTABLE - 1:
            found.append(None)
            continue
        _, first, members = np.unique(control.group[rows], return_index=True, return_counts=True)
        share = np.sum((members / len(rows)) ** 2 / control.number[rows[first]])
        found.append(
            changed_genes(
                values[rows] - control.mean[rows],
                control.deviation[truths.scene.context[rows[0]]],
                freedom,
                share,
            )
        )
    return found


def _of_sets(values: list[float], truths: SplitContext, reason: str) -> MetricDraws:
    return _or_null(
        np.array(values, dtype=float),
        truths,
        UNTESTED if all(genes is None for genes in truths.effects[0]) else reason,
    )


def _or_null(values: np.ndarray, truths: SplitContext, reason: str) -> MetricDraws:
    return truths.over_treated(values) if np.isfinite(values).any() else MetricDraws.null(reason)


# --- distributions ----------------------------------------------------------------------------------------------------


def _distributions(said: Prediction, truths: SplitContext) -> dict[str, MetricDraws]:
    scene = truths.scene
    spoken = said.values if said.drawn is None else said.drawn
    given = np.isfinite(spoken[:, 0])
    groups = [
        rows[given[rows]] for rows in truths.groups
    ]  # both sides of the samples that are predicted
    observed, predicted = (
        scene.observed @ truths.axes,
        np.where(given[:, None], spoken, 0) @ truths.axes,
    )
    distance = [metrics.e_distance(predicted[rows], observed[rows]) for rows in groups]
    alone = "no treated condition has two samples that are predicted"
    spread = MetricDraws.null(NO_DISTRIBUTION)
    if said.drawn is not None:
        values = [metrics.spread_pearson(scene.observed[rows], said.drawn[rows]) for rows in groups]
        spread = _or_null(np.array(values, dtype=float), truths, alone)
    calibration = MetricDraws.null(NO_DISTRIBUTION)
    if said.pit is not None:
        histogram = metrics.pit_histogram(said.pit, scene.condition)
        calibration = MetricDraws(
            metrics.calibration(histogram, truths.resamples.weights), truths.resamples.number
        )
    likelihood = MetricDraws.null(NO_DISTRIBUTION if said.pit is None else NO_PROBABILITY)
    if said.log_likelihood is not None:
        likelihood = truths.over_samples(said.log_likelihood)
    energy = _or_null(np.array(distance, dtype=float), truths, alone)
    return {
        "calibration": calibration,
        "count_log_likelihood": likelihood,
        "e_distance": energy,
        "spread_pearson": spread,
    }


def _target_bias(said: Prediction, truths: SplitContext) -> MetricDraws:
    if (truths.scene.target < 0).all():
        return MetricDraws.null("no sample's perturbation has a known target gene")
    values = metrics.target_bias(truths.scene.observed, said.values, truths.scene.target)
    return (
        truths.over_samples(values)
        if np.isfinite(values).any()
        else MetricDraws.null("nothing is said of the samples with a target gene")
    )
