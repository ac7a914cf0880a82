"""All metrics of one prediction on one scene, as values on the samples themselves and on every bootstrap resample.

N samples, G genes, C conditions, R resamples. Expression is log-CPM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.gem import metrics
from pipeline.gem.differential import de_direction, de_jaccard, differential_genes
from pipeline.gem.predictors import Prediction
from pipeline.gem.resampling import Resamples, Score
from pipeline.gem.scenes import Scene

BASELINE, CEILING, REPLICATE = "ridge", "oracle_metadata", "replicate"
COMPONENTS = 50   # of the training expression, for energy distances
TESTABLE = 4      # treated samples at least: Welch's test of two or three against many controls finds small variances, not genes

NO_DISTRIBUTION = "predicts a mean, not a distribution"
NO_CONTROLS = "no two disjoint sets of controls of the same context"


@dataclass(frozen=True)
class Measured:
    """One metric: (R + 1,) values, the first on the samples themselves; or None with a reason."""

    values: np.ndarray | None
    conditions: int = 0
    reason: str = ""

    @classmethod
    def null(cls, reason: str) -> "Measured":
        return cls(None, reason=reason)


@dataclass(frozen=True)
class Truths:
    """What of a scene is the same for every predictor, worked out once. Changes are means over the samples of a condition."""

    scene: Scene
    resamples: Resamples
    conditions: np.ndarray                # (T,) indices of the treated conditions
    condition: np.ndarray                 # (n,) position of each treated sample among them
    observed: np.ndarray                  # (T, G) mean expression
    differential: np.ndarray | None       # (T, G) bool: genes that really change (known truth), or that Welch's test finds
    changed: np.ndarray | None            # (T, G) by how much
    axes: np.ndarray                      # (G, D) principal axes of the training expression
    errors: Mapping[str, np.ndarray]      # predictor to (N,) squared error, mean over genes and over seeds

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(T, G) of per-sample values (N, G), over the treated samples of each condition."""
        return metrics.condition_means(values[self.scene.treated], self.condition)

    def groups(self) -> list[np.ndarray]:
        """Rows of each treated condition."""
        rows = np.flatnonzero(self.scene.treated)
        order = np.argsort(self.condition, kind="stable")
        return np.split(rows[order], np.cumsum(np.bincount(self.condition, minlength=len(self.conditions)))[:-1])

    def over_treated(self, values: np.ndarray) -> Measured:
        """From values (T,) of the treated conditions, NaN where one has none."""
        spread = np.full(self.resamples.number, np.nan)
        spread[self.conditions] = values
        return Measured(self.resamples.condition_mean(spread), int(np.isfinite(values).sum()))

    def over_samples(self, values: np.ndarray) -> Measured:
        """From per-sample values (N,), NaN where a sample has none."""
        given = np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.resamples.sums(np.where(given, values, 0.0)) / self.resamples.sums(given.astype(float))
        return Measured(found, len(np.unique(self.scene.condition[given])))


def measure(said: Prediction, truths: Truths) -> dict[str, Measured]:
    """Every metric of METRICS, in its order."""
    if said.values is None:
        return {name: Measured.null(said.reason) for name in metrics.METRICS}
    found = _levels(said, truths) | _changes(said, truths) | _distributions(said, truths)
    found["target_bias"] = _target_bias(said, truths)
    return {name: found[name] for name in metrics.METRICS}


def score(measured: list[Measured], resamples: Resamples) -> Score:
    """The mean over training seeds, with the interval over conditions."""
    usable = [one for one in measured if one.values is not None]
    if len(usable) < len(measured) or not usable:
        return Score.null(next(one.reason for one in measured if one.values is None))
    found = resamples.score(np.mean([one.values for one in usable], axis=0), usable[0].conditions)
    return replace(found, reason=found.reason or usable[0].reason)


# --- levels -----------------------------------------------------------------------------------------------------------


def _levels(said: Prediction, truths: Truths) -> dict[str, Measured]:
    observed, predicted = truths.scene.observed, said.values
    covered = np.isfinite(predicted[:, 0])
    note = "" if covered.all() else f"on the {int(covered.sum())} of {len(covered)} samples that it predicts"
    error = metrics.squared_error(observed, predicted)
    found = {
        "mse": truths.over_samples(error),
        "mae": truths.over_samples(metrics.absolute_error(observed, predicted)),
        "skill": _skill(error, CEILING, said, truths),
        "skill_replicate": _skill(error, REPLICATE, said, truths),
        "sample_pearson": _sample_pearson(observed[covered], predicted[covered], covered, truths),
        "gene_pearson": _gene_pearson(observed[covered], predicted[covered], covered, truths),
    }
    return {name: one if one.values is None or one.reason else replace(one, reason=note) for name, one in found.items()}


def _skill(error: np.ndarray, ideal: str, said: Prediction, truths: Truths) -> Measured:
    """Null where there is no ideal, or where it is not clearly better than the baseline: a share of nothing says nothing."""
    if ideal not in truths.errors:
        return Measured.null("the truth of this cohort is not known: there is no oracle" if ideal == CEILING else "no condition has two samples")
    rows = np.isfinite(error) & np.isfinite(truths.errors[ideal])
    if not rows.any():
        return Measured.null("no sample is predicted by both")
    means = [truths.over_samples(np.where(rows, one, np.nan)) for one in (error, truths.errors[BASELINE], truths.errors[ideal])]
    gap = truths.resamples.score(means[1].values - means[2].values, means[1].conditions)
    if gap.low is None or gap.low <= 0:
        return Measured.null(f"{BASELINE} and {ideal} do not differ clearly on these samples")
    reason = "1 is the ideal predictor from metadata; a sample of the same study can tell more" if said.sees_study and ideal == CEILING else ""
    return Measured(metrics.skill(*(one.values for one in means)), means[0].conditions, reason)


def _sample_pearson(observed: np.ndarray, predicted: np.ndarray, covered: np.ndarray, truths: Truths) -> Measured:
    values = np.full(len(covered), np.nan)
    values[covered] = metrics.sample_pearson(observed, predicted)
    if np.isnan(values[covered]).any():
        return Measured.null("a sample is predicted, or observed, constant over genes")
    return truths.over_samples(values)


def _gene_pearson(observed: np.ndarray, predicted: np.ndarray, covered: np.ndarray, truths: Truths) -> Measured:
    resamples = truths.resamples.of_rows(covered)
    values = metrics.gene_pearson(observed, predicted, resamples)
    if not np.isfinite(values[0]):
        return Measured.null("every gene is predicted constant over the samples")
    return Measured(values, len(np.unique(resamples.condition)))


# --- changes ----------------------------------------------------------------------------------------------------------


def own_control(said: Prediction, scene: Scene) -> np.ndarray | None:
    """(N, G) A change is from controls that the predictor knew: one without the new study's effect would else carry its negative."""
    return scene.reference_control if said.sees_study else scene.predicted_control


def changes(said: Prediction, truths: Truths) -> tuple[np.ndarray, np.ndarray] | None:
    """((T, G) observed, (T, G) predicted) change from control of the treated conditions; NaN rows where nothing is said of one."""
    control = own_control(said, truths.scene)
    if not len(truths.conditions) or truths.scene.observed_control is None or control is None:
        return None
    given = np.isfinite(said.values[:, :1])
    return (
        _masked_mean(truths.scene.observed - truths.scene.observed_control, given, truths),
        _masked_mean(np.where(given, said.values - control, 0.0), given, truths),
    )


def _masked_mean(values: np.ndarray, given: np.ndarray, truths: Truths) -> np.ndarray:
    """(T, G) mean over the samples that a predictor says something of."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return truths.mean(np.where(given, values, 0.0)) / truths.mean(given.astype(float))


def _changes(said: Prediction, truths: Truths) -> dict[str, Measured]:
    names = ("delta_pearson", "delta_pearson_systema", "discrimination", "de_direction", "de_jaccard")
    if not len(truths.conditions):
        return dict.fromkeys(names, Measured.null("no treated sample in this split"))
    pair = changes(said, truths)
    if pair is None:
        return dict.fromkeys(names, Measured.null(NO_CONTROLS))
    observed, predicted = pair
    found = {
        "delta_pearson": _delta(observed, predicted, truths),
        "delta_pearson_systema": _systema(said, truths),
        "discrimination": _discrimination(observed, predicted, truths),
        "de_direction": _direction(predicted, truths),
        "de_jaccard": _jaccard(said, truths),
    }
    return found


def delta_values(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(T,) NaN where nothing is said. A condition without predicted change tells nothing of its direction: correlation 0."""
    values = metrics.delta_pearson(np.nan_to_num(observed), np.nan_to_num(predicted))
    return np.where(np.isfinite(predicted[:, 0]), np.nan_to_num(values), np.nan)


def _delta(observed: np.ndarray, predicted: np.ndarray, truths: Truths) -> Measured:
    if not (np.nanmax(np.abs(predicted), initial=0) > metrics.ROUNDING):
        return Measured.null("no change is predicted in any condition")
    return truths.over_treated(delta_values(observed, predicted))


def _systema(said: Prediction, truths: Truths) -> Measured:
    centre = truths.scene.perturbed_centre
    if centre is None:
        return Measured.null("training has no perturbation")
    given = np.isfinite(said.values[:, :1])
    observed = _masked_mean(truths.scene.observed - centre, given, truths)
    return truths.over_treated(delta_values(observed, _masked_mean(np.where(given, said.values - centre, 0.0), given, truths)))


def _discrimination(observed: np.ndarray, predicted: np.ndarray, truths: Truths) -> Measured:
    said = np.isfinite(predicted[:, 0])
    if said.sum() < 2:
        return Measured.null("fewer than two treated conditions")
    values = np.full(len(said), np.nan)
    values[said] = metrics.discrimination(observed[said], predicted[said])
    return truths.over_treated(values)


def _direction(predicted: np.ndarray, truths: Truths) -> Measured:
    if truths.differential is None:
        return Measured.null("too few samples of any condition and its controls to find differential genes")
    values = [
        de_direction(genes, change, row) if np.isfinite(row[0]) else np.nan
        for genes, change, row in zip(truths.differential, truths.changed, predicted, strict=True)
    ]
    return _or_null(np.array(values), truths, "no condition has a differential gene")


def _jaccard(said: Prediction, truths: Truths) -> Measured:
    if said.drawn is None:
        return Measured.null(NO_DISTRIBUTION)
    if truths.differential is None:
        return Measured.null("too few samples of any condition and its controls to find differential genes")
    found = differential(said.drawn - own_control(said, truths.scene), truths, truths.scene.predicted_residuals)
    values = [np.nan if genes is None else de_jaccard(real, genes) for real, genes in zip(truths.differential, found, strict=True)]
    return _or_null(np.array(values, dtype=float), truths, f"no condition has {TESTABLE} samples and a differential gene")


def differential(change: np.ndarray, truths: Truths, residuals: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """For each treated condition the genes (G,) bool that Welch's test finds, of changes (N, G) from matched control means
    against the residuals of controls of the same context; None with too few samples on a side."""
    found: list[np.ndarray | None] = []
    for rows in truths.groups():
        rows = rows[np.isfinite(change[rows, 0])]
        control = residuals.get(truths.scene.context[rows[0]], ()) if len(rows) else ()
        enough = len(rows) >= TESTABLE and len(control) >= TESTABLE
        found.append(differential_genes(change[rows], control)[0] if enough else None)
    return found


def _or_null(values: np.ndarray, truths: Truths, reason: str) -> Measured:
    return truths.over_treated(values) if np.isfinite(values).any() else Measured.null(reason)


# --- distributions ----------------------------------------------------------------------------------------------------


def _distributions(said: Prediction, truths: Truths) -> dict[str, Measured]:
    scene = truths.scene
    spoken = said.values if said.drawn is None else said.drawn
    projected = [values @ truths.axes for values in (scene.observed, np.nan_to_num(spoken))]
    given = np.isfinite(spoken[:, 0])
    distance = [metrics.e_distance(projected[1][rows[given[rows]]], projected[0][rows]) for rows in truths.groups()]
    alone = "no treated condition has two samples"
    spread = Measured.null(NO_DISTRIBUTION)
    if said.drawn is not None:
        values = [metrics.spread_pearson(scene.observed[rows], said.drawn[rows[given[rows]]]) for rows in truths.groups()]
        spread = _or_null(np.array(values, dtype=float), truths, alone)
    calibration = Measured.null(NO_DISTRIBUTION)
    if said.pit is not None:
        histogram = metrics.pit_histogram(said.pit, scene.condition)
        calibration = Measured(metrics.calibration(histogram, truths.resamples.weights), truths.resamples.number)
    return {"calibration": calibration, "e_distance": _or_null(np.array(distance, dtype=float), truths, alone), "spread_pearson": spread}


def _target_bias(said: Prediction, truths: Truths) -> Measured:
    if (truths.scene.target < 0).all():
        return Measured.null("no sample's perturbation has a known target gene")
    values = metrics.target_bias(truths.scene.observed, said.values, truths.scene.target)
    return truths.over_samples(values) if np.isfinite(values).any() else Measured.null("nothing is said of the samples with a target gene")


# --- what is true -----------------------------------------------------------------------------------------------------


def truths_of(
    scene: Scene,
    resamples: Resamples,
    axes: np.ndarray,
    errors: Mapping[str, np.ndarray],
    true_change: Callable[[Scene], tuple[np.ndarray, np.ndarray]] | None,
) -> Truths:
    """`true_change` gives (changed (N, G) bool, change (N, G)) where the truth is known; else Welch's test says what changes."""
    conditions, condition = np.unique(scene.condition[scene.treated], return_inverse=True)
    rows = np.flatnonzero(scene.treated)
    found = Truths(scene, resamples, conditions, condition, np.zeros((0, 0)), None, None, axes, errors)
    if not len(rows):
        return found
    observed = found.mean(scene.observed)
    if true_change is not None:
        changed, change = true_change(scene)
        return replace(found, observed=observed, differential=found.mean(changed.astype(float)) >= 0.5, changed=found.mean(change))
    if scene.observed_control is None:
        return replace(found, observed=observed)
    change = scene.observed - scene.observed_control
    tested = differential(change, found, scene.observed_residuals)
    genes = np.stack([np.zeros(observed.shape[1], dtype=bool) if one is None else one for one in tested])
    return replace(found, observed=observed, differential=genes if genes.any() else None, changed=found.mean(change))
