"""Test splits as predictors and metrics see them: samples, references, and controls for each side.

N samples of a split, G genes. Expression is log-CPM.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Evaluate
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.labels import join_keys
from pipeline.gem.data.references import SampleGroups, choose_references
from pipeline.gem.data.splits import TEST_CONTROL, TESTS, TRAIN, Entities
from pipeline.gem.evaluation.baselines import GroupMeans
from pipeline.gem.model.query import TargetGenes

# The entities that a split holds out as a whole: errors within one are not independent.
HELD_OUT = {"test_combination": "pair", "test_perturbation": "perturbation", "test_study": "study"}
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
    predicted_control: Controls | None  # of training, disjoint from the observed ones
    reference_control: Controls | None  # of training, and those of a new study that predictors see
    context: np.ndarray  # (N,) names; "" for none
    study: np.ndarray
    perturbation: np.ndarray
    pair: np.ndarray  # context and perturbation
    condition_name: np.ndarray  # context, perturbation, dose and time
    perturbed_centroid: np.ndarray | None  # (N, G) mean of the centroids of training perturbations
    target: np.ndarray  # (N,) position of the perturbation's target gene, -1 without
    condition: np.ndarray  # (N,) index
    entity: np.ndarray  # (N,) index of the held-out pair, perturbation or study; else the condition
    entity_kind: str
    treated: np.ndarray  # (N,) bool, not a control

    @property
    def totals(self) -> np.ndarray:
        """(N,) total counts over all genes of the source."""
        return self.samples["total"].to_numpy()

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
    pit: np.ndarray | None = None  # (N, G) probability integral transform of the observed counts
    log_likelihood: np.ndarray | None = None  # (N,) nats, of the observed counts of a sample
    reason: str = ""
    uses_study_controls: bool = False  # from a reference or the truth: also of a new study


class EvaluationSplits:
    """The training split of a cohort, which baselines are fitted on, and its test splits."""

    def __init__(self, cohort: Cohort, params: Evaluate):
        self.cohort, self.params, self.data = cohort, params, cohort.declared
        self.train = cohort.rows([TRAIN])
        self.train_expression = cohort.expression([TRAIN])
        self._centroids = self._perturbed_centroids()

    def __iter__(self) -> Iterator[EvaluationSplit]:
        for name in TESTS:
            if self.cohort.has(name):
                yield self.split(name)

    def split(self, name: str) -> EvaluationSplit:
        """The test split of this name.

        The controls of a new study are halved: one half may be used as references and is not
        scored, the other is the observed side of changes.
        """
        samples = self.cohort.rows([name])
        control = SampleGroups(samples, self.data).control.to_numpy()
        visible, needed = np.zeros((2, len(samples)), dtype=bool)
        if name == "test_study":
            visible[control] = self._second_halves(samples[control])
            needed[control] = True
        scored = self._scored(samples, ~visible)
        needed |= scored
        scored = scored[needed]
        counts = self.cohort.counts([name], needed)
        samples, control, visible = samples[needed], control[needed], visible[needed]
        expression = log_cpm(counts, samples["total"].to_numpy())
        rows, groups = samples[scored], SampleGroups(samples[scored], self.data)
        pool = pd.concat([self.train, samples[visible]])
        pool_expression = np.concatenate([self.train_expression, expression[visible]])
        reference = choose_references(rows, pool, self.data, self.params.seed)
        hidden, hidden_expression = self._hidden_controls(
            name, samples, expression, control & ~visible
        )
        centroid = None
        if self._centroids is not None:
            centroid = self._centroids.lookup(_context_keys(groups))
        # Sorted by name: the resamples do not depend on the order of samples.
        condition = pd.factorize(groups.condition, sort=True)[0]
        entity, entity_kind = condition, "condition"
        entities = Entities.of(rows, self.data)
        if name in HELD_OUT:
            entity_kind = HELD_OUT[name]
            held_out = getattr(entities, entity_kind).fillna("control")
            entity = pd.factorize(held_out, sort=True)[0]
        return EvaluationSplit(
            name=name,
            samples=rows,
            counts=counts[scored],
            observed=expression[scored],
            reference=None if reference is None else pool_expression[reference],
            reference_samples=None if reference is None else pool.iloc[reference],
            observed_control=self._controls(groups, hidden, hidden_expression),
            predicted_control=self._controls(groups, self.train, self.train_expression),
            reference_control=self._controls(groups, pool, pool_expression),
            context=_names(entities.context),
            study=_names(entities.study),
            perturbation=_names(entities.perturbation),
            pair=_names(entities.pair),
            condition_name=groups.condition.to_numpy(),
            perturbed_centroid=centroid,
            target=TargetGenes.from_cohort(self.cohort).positions(rows),
            condition=condition,
            entity=entity,
            entity_kind=entity_kind,
            treated=~control[scored],
        )

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

    def _hidden_controls(
        self, name: str, samples: pd.DataFrame, expression: np.ndarray, own: np.ndarray
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Controls that no predictor sees: of a new study its `own` (N,), else the reserved."""
        if name == "test_study":
            return samples[own], expression[own]
        return self.cohort.rows([TEST_CONTROL]), self.cohort.expression([TEST_CONTROL])

    def _controls(
        self, groups: SampleGroups, pool: pd.DataFrame, expression: np.ndarray
    ) -> Controls | None:
        """The controls of a pool that match each sample; None if no sample has any."""
        is_control = SampleGroups(pool, self.data).control.to_numpy()
        controls, values = SampleGroups(pool[is_control], self.data), expression[is_control]
        if not len(values):
            return None
        means = GroupMeans.fit([controls.study_context, controls.context], values)
        mean = means.lookup([groups.study_context, groups.context])
        if np.isnan(mean).all():
            return None
        of_study = groups.study_context.map(controls.study_context.value_counts())
        of_context = groups.context.map(controls.context.value_counts())
        group = np.where(
            of_study.notna(), "study: " + groups.study_context, "context: " + groups.context
        )
        return Controls(
            mean,
            of_study.fillna(of_context).to_numpy(),
            pd.factorize(group)[0],
            *_pooled_deviation(controls, values),
        )

    def _perturbed_centroids(self) -> GroupMeans | None:
        """By context, else over all: each training perturbation counts once. Systema's reference
        (Nature Biotechnology 2025)."""
        treated = ~SampleGroups(self.train, self.data).control.to_numpy()
        if self.data.control is None or not treated.any():
            return None
        groups = SampleGroups(self.train[treated], self.data)
        pair = join_keys([groups.context, groups.perturbation]).to_numpy()
        pairs = pd.DataFrame(self.train_expression[treated]).groupby(pair)
        first = [positions[0] for positions in pairs.indices.values()]
        centroids = pairs.mean().loc[list(pairs.indices)].to_numpy()
        return GroupMeans.fit([key.iloc[first] for key in _context_keys(groups)], centroids)


def _names(column: pd.Series) -> np.ndarray:
    return column.fillna("").to_numpy(dtype=object)


def _context_keys(groups: SampleGroups) -> list[pd.Series]:
    return [groups.context, groups.everything]


def _pooled_deviation(
    groups: SampleGroups, values: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By context: (G,) standard deviation of controls (n, G) around the mean of their context and
    study, and its degrees of freedom; contexts without any are left out."""
    frame, context = pd.DataFrame(values, dtype=np.float64), groups.context.to_numpy()
    residual = frame - frame.groupby(groups.study_context.to_numpy()).transform("mean")
    squares = residual.pow(2).groupby(context).sum()
    within = groups.study_context.groupby(context)
    degrees = within.size() - within.nunique()
    degrees = degrees[degrees > 0].to_dict()
    deviation = {name: np.sqrt(squares.loc[name].to_numpy() / degrees[name]) for name in degrees}
    return deviation, degrees
