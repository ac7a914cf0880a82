"""Test splits as predictors and metrics see them: samples, references, and controls for each side.

Visible are the samples of the training and validation splits.

N samples of a split, G genes. Expression is log-CPM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Evaluate
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.labels import join_keys
from pipeline.gem.data.references import SampleGroups, choose_references
from pipeline.gem.data.splits import TEST_CONTROL, TESTS, VISIBLE, Entities
from pipeline.gem.evaluation.baselines.profiles import GroupMeans, Groups, Profiles, mean_weights
from pipeline.gem.evaluation.baselines.visible_samples import VisibleSamples
from pipeline.gem.evaluation.metrics import pit_genes
from pipeline.gem.model.query import TargetGenes

# The entities that a split holds out as a whole: errors within one are not independent.
HELD_OUT = {
    "test_combination": "pair",
    "test_condition": "condition",
    "test_context": "context",
    "test_level": "level",
    "test_perturbation": "perturbation",
    "test_study": "study",
}
NO_REFERENCE = "a sample has no control of its context to start from"


@dataclass(frozen=True)
class Controls:
    """The matched controls of each sample: of its context and study if any, else of its context."""

    mean: np.ndarray  # (N, G); NaN rows for samples without a control
    number: np.ndarray  # (N,) how many controls; NaN without any
    group: np.ndarray  # (N,) index, equal for samples with the same controls
    deviation: dict[str, np.ndarray]  # context to (G,) pooled standard deviation within studies
    degrees_of_freedom: dict[str, int]  # context to those of `deviation`, at least 1


@dataclass(frozen=True)
class EvaluationSplit:
    """The scored samples of one split with their references and controls."""

    name: str
    samples: pd.DataFrame  # (N, ...)
    counts: np.ndarray  # (N, G)
    observed: np.ndarray  # (N, G)
    reference: np.ndarray | None  # (N, G) of each sample's reference
    reference_samples: pd.DataFrame | None  # (N, ...) metadata of the references
    observed_control: Controls | None  # hidden from predictors; None if no sample has any
    predicted_control: Controls | None  # visible, disjoint from the observed ones
    shared_control: bool  # no control is hidden: visible ones are on the observed side too
    reference_control: Controls | None  # visible, and those of a new study that predictors see
    context: np.ndarray  # (N,) names; "" for none
    study: np.ndarray
    perturbation: np.ndarray
    pair: np.ndarray  # context and perturbation
    condition_name: np.ndarray  # context, perturbation, dose and time
    perturbed_centroid: np.ndarray | None  # (N, G) mean of the centroids of visible perturbations
    target: np.ndarray  # (N, K) positions of the perturbation's target genes, -1 without
    condition: np.ndarray  # (N,) index
    entity: np.ndarray  # (N,) index of what the split holds out, as in HELD_OUT; else the condition
    entity_kind: str
    treated: np.ndarray  # (N,) bool, not a control

    @property
    def totals(self) -> np.ndarray:
        """(N,) total counts over all genes of the source."""
        return self.samples["total"].to_numpy()

    @property
    def pit_genes(self) -> np.ndarray:
        """(g,) positions of the genes on which calibration is measured."""
        return pit_genes(*self.counts.shape)

    def control_of(self, predicted: "PredictedSplit") -> Controls | None:
        """The controls that a predicted change is taken from: those that the predictor used.

        Otherwise a predictor without the effect of a new study would carry its negative.
        """
        return self.reference_control if predicted.uses_study_controls else self.predicted_control


@dataclass(frozen=True)
class PredictedSplit:
    """The prediction of a split by one predictor (one training seed of it)."""

    values: np.ndarray | None  # (N, G) expected log-CPM, NaN rows if not predicted; None: `reason`
    draw: np.ndarray | None = None  # (N, G) log-CPM, one draw per sample of its distribution
    pit: np.ndarray | None = None  # (N, g) probability integral transform of counts of `pit_genes`
    log_likelihood: np.ndarray | None = None  # (N,) nats, of the observed counts of a sample
    reason: str = ""
    uses_study_controls: bool = False  # from a reference or the truth: also of a new study


@dataclass(frozen=True)
class _SplitRows:
    """What the samples (M,) of a test split are used for."""

    name: str
    samples: pd.DataFrame  # (M, ...)
    scored: np.ndarray  # (M,) bool
    visible: np.ndarray  # (M,) bool, controls of a new study that may be references
    hidden: np.ndarray  # (M,) bool, controls of a new study on the observed side of changes
    references: np.ndarray | None  # (N,) of the scored: visible rows, then those of the split
    reference_samples: pd.DataFrame | None  # (N, ...)


class EvaluationSplits:
    """The test splits of a cohort, and what predictors and metrics need of the visible samples."""

    def __init__(self, cohort: Cohort, params: Evaluate):
        self.cohort, self.params, self.data = cohort, params, cohort.declared
        pool = cohort.rows(VISIBLE)
        self._rows = {name: self._split_rows(name, pool) for name in TESTS if cohort.has(name)}
        references = [
            rows.references for rows in self._rows.values() if rows.references is not None
        ]
        kept = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *references]))
        self.visible = VisibleSamples.read(cohort, kept[kept < len(pool)])
        self._reserved = self._profiles(TEST_CONTROL, None) if cohort.has(TEST_CONTROL) else None
        self._centroids = self._perturbed_centroids()

    def __iter__(self) -> Iterator[EvaluationSplit]:
        for name in self._rows:
            yield self.split(name)

    def _split_rows(self, name: str, pool: pd.DataFrame) -> _SplitRows:
        """The controls of a new study are halved: one half may be used as references and is not
        scored, the other is the observed side of changes."""
        samples = self.cohort.rows([name])
        visible, hidden = np.zeros((2, len(samples)), dtype=bool)
        if name == "test_study":
            control = SampleGroups(samples, self.data).control.to_numpy()
            visible[control] = self._second_halves(samples[control])
            hidden = control & ~visible
        scored = self._scored(samples, ~visible)
        if visible.any():
            pool = pd.concat([pool, samples[visible]])
        chosen = choose_references(samples[scored], pool, self.data, self.params.seed)
        of_chosen = None if chosen is None else pool.iloc[chosen]
        return _SplitRows(name, samples, scored, visible, hidden, chosen, of_chosen)

    def split(self, name: str) -> EvaluationSplit:
        """The test split of this name."""
        plan = self._rows[name]
        samples = plan.samples[plan.scored]
        counts = self.cohort.counts([name], plan.scored)
        groups, entities = SampleGroups(samples, self.data), Entities.of(samples, self.data)
        pool = [self.visible.profiles]
        predicted = reference = self._controls(groups, pool)
        observed = self._observed_controls(plan, groups)
        shared = observed is None and predicted is not None
        if plan.visible.any():
            reference = self._controls(groups, [*pool, self._profiles(name, plan.visible)])
        centroid = None
        if self._centroids is not None:
            centroid = self._centroids.lookup(_context_keys(groups))
        # Sorted by name: the resamples do not depend on the order of samples.
        condition = pd.factorize(groups.condition, sort=True)[0]
        entity, entity_kind = condition, "condition"
        if name in HELD_OUT:
            entity_kind = HELD_OUT[name]
            held_out = getattr(entities, entity_kind).fillna("control")
            entity = pd.factorize(held_out, sort=True)[0]
        return EvaluationSplit(
            name=name,
            samples=samples,
            counts=counts,
            observed=log_cpm(counts, samples["total"].to_numpy()),
            reference=None if plan.references is None else self._reference_expression(plan),
            reference_samples=plan.reference_samples,
            observed_control=predicted if shared else observed,
            predicted_control=predicted,
            shared_control=shared,
            reference_control=reference,
            context=_names(entities.context),
            study=_names(entities.study),
            perturbation=_names(entities.perturbation),
            pair=_names(entities.pair),
            condition_name=groups.condition.to_numpy(),
            perturbed_centroid=centroid,
            target=TargetGenes.from_cohort(self.cohort).positions(samples),
            condition=condition,
            entity=entity,
            entity_kind=entity_kind,
            treated=~groups.control.to_numpy(),
        )

    def _reference_expression(self, plan: _SplitRows) -> np.ndarray:
        """(N, G)"""
        number = len(self.visible.samples)
        own = plan.references >= number
        expression = np.empty((len(own), len(self.cohort.genes)), dtype=np.float32)
        expression[~own] = self.visible.kept[plan.references[~own]]
        wanted, index = np.unique(plan.references[own] - number, return_inverse=True)
        chosen = np.zeros(len(plan.samples), dtype=bool)
        chosen[np.flatnonzero(plan.visible)[wanted]] = True
        counts = self.cohort.counts([plan.name], chosen)
        expression[own] = log_cpm(counts, plan.samples["total"].to_numpy()[chosen])[index]
        return expression

    def _profiles(self, split: str, chosen: np.ndarray | None) -> Profiles:
        """Of the chosen samples (bool) of a split; of all for None."""
        samples = self.cohort.rows([split])
        blocks = self.cohort.expression_blocks([split], chosen)
        return Profiles.of(self.data, samples if chosen is None else samples[chosen], blocks)

    def _scored(self, samples: pd.DataFrame, candidates: np.ndarray) -> np.ndarray:
        """(N,) bool: the candidates (N,), or whole conditions of them, drawn by seed, with at most
        `params.split_samples` samples; at least one condition."""
        names = SampleGroups(samples[candidates], self.data).condition
        # Sorted by name: the draw does not depend on the order of samples.
        condition = pd.factorize(names, sort=True)[0]
        sizes = np.bincount(condition)
        order = np.random.default_rng(self.params.seed).permutation(len(sizes))
        fits = np.cumsum(sizes[order]) <= max(self.params.split_samples, sizes[order[0]])
        scored = np.zeros(len(samples), dtype=bool)
        scored[candidates] = np.isin(condition, order[fits])
        return scored

    def _second_halves(self, controls: pd.DataFrame) -> np.ndarray:
        """(N,) bool: every second control of a context and study, in an order drawn by seed.

        The result does not depend on the order of rows.
        """
        order = np.argsort(controls["sample_id"].to_numpy(dtype=str), kind="stable")
        shuffled = np.random.default_rng(self.params.seed).permutation(order)
        key = SampleGroups(controls, self.data).study_context.to_numpy()[shuffled]
        second = np.empty(len(controls), dtype=bool)
        second[shuffled] = pd.Series(key).groupby(key).cumcount() % 2 == 1
        return second

    def _observed_controls(self, plan: _SplitRows, groups: SampleGroups) -> Controls | None:
        """The hidden controls that match each sample; None if no treated sample has any."""
        hidden, treated = self._hidden_controls(plan), ~groups.control.to_numpy()
        controls = None if hidden is None else self._controls(groups, [hidden])
        if controls is None or np.isnan(controls.mean[treated, 0]).all():
            return None
        return controls

    def _hidden_controls(self, plan: _SplitRows) -> Profiles | None:
        """Controls that no predictor sees: of a new study its own, else the reserved."""
        if plan.name != "test_study":
            return self._reserved
        return self._profiles(plan.name, plan.hidden) if plan.hidden.any() else None

    def _controls(self, groups: SampleGroups, pools: list[Profiles]) -> Controls | None:
        """The controls of the pools that match each sample; None if no sample has any."""
        controls = reduce(Groups.joined, [pool.controls for pool in pools])
        if not len(controls.sizes):
            return None
        keys = SampleGroups(controls.samples, self.data)
        means = GroupMeans.fit([keys.study_context, keys.context], controls)
        mean = means.lookup([groups.study_context, groups.context])
        if np.isnan(mean).all():
            return None
        sizes = pd.Series(controls.sizes, index=controls.samples.index)
        of_study = groups.study_context.map(sizes.groupby(keys.study_context).sum())
        of_context = groups.context.map(sizes.groupby(keys.context).sum())
        group = np.where(
            of_study.notna(), "study: " + groups.study_context, "context: " + groups.context
        )
        squares = reduce(partial(pd.DataFrame.add, fill_value=0), [pool.squares for pool in pools])
        return Controls(
            mean,
            of_study.fillna(of_context).to_numpy(),
            pd.factorize(group)[0],
            *_pooled_deviation(controls, keys, squares),
        )

    def _perturbed_centroids(self) -> GroupMeans | None:
        """By context, else over all: each visible perturbation counts once. Systema's reference
        (Nature Biotechnology 2025)."""
        treated = self.visible.profiles.treated
        if self.data.control is None or not len(treated.sizes):
            return None
        groups = SampleGroups(treated.samples, self.data)
        code, pairs = pd.factorize(join_keys([groups.context, groups.perturbation]).to_numpy())
        _, first = np.unique(code, return_index=True)
        centroids = treated.means(mean_weights(code, len(pairs), treated.sizes))
        of_pairs = Groups(treated.samples.iloc[first], np.ones(len(pairs)), centroids)
        return GroupMeans.fit(_context_keys(SampleGroups(of_pairs.samples, self.data)), of_pairs)


def _names(column: pd.Series) -> np.ndarray:
    return column.fillna("").to_numpy(dtype=object)


def _context_keys(groups: SampleGroups) -> list[pd.Series]:
    return [groups.context, groups.everything]


def _pooled_deviation(
    controls: Groups, keys: SampleGroups, squares: pd.DataFrame
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By context: (G,) standard deviation of controls around the mean of their context and study,
    and its degrees of freedom; contexts without any are left out.

    `squares` (contexts, G): sums of squares of the controls.
    """
    study_code, studies = pd.factorize(keys.study_context.to_numpy())
    weights = mean_weights(study_code, len(studies), controls.sizes)
    means, sizes = controls.means(weights), np.bincount(study_code, weights=controls.sizes)
    _, first = np.unique(study_code, return_index=True)
    context = keys.context.to_numpy()[first]  # of each context and study
    deviation, degrees = {}, {}
    for name in np.unique(context):
        inside = context == name
        freedom = int(sizes[inside].sum()) - np.count_nonzero(inside)
        if freedom > 0:
            residual = squares.loc[name].to_numpy() - sizes[inside] @ np.square(means[inside])
            deviation[name], degrees[name] = np.sqrt(residual.clip(0) / freedom), freedom
    return deviation, degrees
