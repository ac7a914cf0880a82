"""What a test split looks like to predictors and to metrics: its samples, their references, controls on either side.

N samples of a split, G genes, C conditions. Expression is log-CPM.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Evaluate
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.references import choose_references, matching_keys
from pipeline.gem.data.splits import (
    TEST_CONTROL,
    TESTS,
    TRAIN,
    Entities,
    contexts,
    is_control,
    joined,
)
from pipeline.gem.evaluation.baselines import Means
from pipeline.gem.model.gem import TargetGenes

# What a split holds out as a whole: errors within one are not independent.
HELD_OUT = {"test_combination": "pair", "test_perturbation": "perturbation", "test_study": "study"}


@dataclass(frozen=True)
class Controls:
    """Untreated samples that stand for those of a scene: of the same context and study where there are any, else of the context."""

    mean: np.ndarray  # (N, G); NaN rows where a sample has none
    number: np.ndarray  # (N,) of how many; NaN where none
    group: np.ndarray  # (N,) index: the same for samples with the same controls
    deviation: dict[
        str, np.ndarray
    ]  # by context, (G,) standard deviation of controls around the mean of their context and study
    freedom: dict[str, int]  # by context, its degrees of freedom; contexts without any are left out


@dataclass(frozen=True)
class EvaluationSplit:
    """The scored samples of one split and what surrounds them."""

    name: str
    samples: pd.DataFrame  # (N, ...)
    counts: np.ndarray  # (N, G)
    observed: np.ndarray  # (N, G)
    reference: np.ndarray | None  # (N, G) log-CPM of each sample's reference
    reference_samples: pd.DataFrame | None  # (N, ...) and its metadata
    observed_control: Controls | None  # that no predictor saw; None where no sample has any
    predicted_control: Controls | None  # of training, disjoint from those
    reference_control: (
        Controls | None
    )  # of training, and those of a new study that may be references
    context: np.ndarray  # (N,) names of what each sample belongs to; "" for none
    study: np.ndarray
    perturbation: np.ndarray
    pair: np.ndarray
    condition_name: np.ndarray
    perturbed_centre: (
        np.ndarray | None
    )  # (N, G) mean of the training perturbations' centroids: Systema's reference
    target: np.ndarray  # (N,) position of the perturbation's target gene, -1 without
    condition: np.ndarray  # (N,) index of context, perturbation, dose and time
    entity: (
        np.ndarray
    )  # (N,) index of what the split holds out: a pair, perturbation or study; else the condition
    entity_kind: str
    treated: np.ndarray  # (N,) not a control

    @property
    def totals(self) -> np.ndarray:
        """(N,) total counts over all genes of the source."""
        return self.samples["total"].to_numpy()


class EvaluationSplits:
    """A cohort opened once: the training split as every baseline sees it, and its test splits."""

    def __init__(self, cohort: Cohort, params: Evaluate):
        self.cohort, self.params, self.declared = cohort, params, cohort.declared
        self.train = cohort.rows([TRAIN])
        self.train_expression = cohort.expression([TRAIN])
        self._centres = self._perturbed_centres()

    def __iter__(self) -> Iterator[EvaluationSplit]:
        for name in TESTS:
            if self.cohort.has(name):
                yield self.scene(name)

    def scene(self, name: str) -> EvaluationSplit:
        """A test split by name."""
        samples, expression = self.cohort.rows([name]), self.cohort.expression([name])
        control = is_control(samples, self.declared).to_numpy()
        given = np.zeros(len(samples), dtype=bool)
        if name == "test_study":
            given[control] = self._second_halves(samples[control])
        scored = ~given
        rows = samples[scored]
        shown, shown_expression = (
            pd.concat([self.train, samples[given]]),
            np.concatenate([self.train_expression, expression[given]]),
        )
        hidden, hidden_expression = self._hidden_controls(
            name, samples, expression, control & scored
        )
        chosen = choose_references(rows, shown, self.declared, self.params.seed)
        conditions = condition_names(rows, self.cohort)
        condition = pd.factorize(conditions, sort=True)[
            0
        ]  # by name: resamples do not depend on the order of samples
        entities = Entities.of(rows, self.declared)
        held_out = getattr(entities, HELD_OUT[name]).fillna("control") if name in HELD_OUT else None
        return EvaluationSplit(
            name=name,
            samples=rows,
            counts=self.cohort.counts([name])[scored],
            observed=expression[scored],
            reference=None if chosen is None else shown_expression[chosen],
            reference_samples=None if chosen is None else shown.iloc[chosen],
            observed_control=self._controls(rows, hidden, hidden_expression),
            predicted_control=self._controls(rows, self.train, self.train_expression),
            reference_control=self._controls(rows, shown, shown_expression),
            **{
                kind: getattr(entities, kind).fillna("").to_numpy(dtype=object)
                for kind in ("context", "study", "perturbation", "pair")
            },
            condition_name=conditions.to_numpy(),
            perturbed_centre=None
            if self._centres is None
            else self._centres.lookup(self._places(rows)),
            target=TargetGenes.of(self.cohort)(rows),
            condition=condition,
            entity=condition if held_out is None else pd.factorize(held_out, sort=True)[0],
            entity_kind="condition" if held_out is None else HELD_OUT[name],
            treated=~control[scored],
        )

    def _second_halves(self, controls: pd.DataFrame) -> np.ndarray:
        """(N,) every second control of a context and study, in random order by `sample_id` and seed.

        Of a new study's controls this half may be seen, as references; the other is the observed side.
        """
        order = np.argsort(controls["sample_id"].to_numpy(dtype=str), kind="stable")
        shuffled = np.random.default_rng(self.params.seed).permutation(order)
        key = matching_keys(controls, self.declared)[1].to_numpy()[shuffled]
        second = np.empty(len(controls), dtype=bool)
        second[shuffled] = pd.Series(key).groupby(key).cumcount() % 2 == 1
        return second

    def _hidden_controls(
        self, name: str, samples: pd.DataFrame, expression: np.ndarray, own: np.ndarray
    ) -> tuple[pd.DataFrame, np.ndarray]:
        if name == "test_study":
            return samples[own], expression[own]
        return self.cohort.rows([TEST_CONTROL]), self.cohort.expression([TEST_CONTROL])

    def _controls(
        self, rows: pd.DataFrame, pool: pd.DataFrame, expression: np.ndarray
    ) -> Controls | None:
        """The controls of a pool of samples that match those of a scene; None where no sample has any."""
        chosen = is_control(pool, self.declared).to_numpy()
        controls, values = pool[chosen], expression[chosen]
        if not len(controls):
            return None
        keys, wanted = (matching_keys(samples, self.declared)[1:] for samples in (controls, rows))
        mean = Means.fit(keys, values).lookup(wanted)
        if np.isnan(mean).all():
            return None
        numbers = [
            of_rows.map(of_controls.value_counts())
            for of_rows, of_controls in zip(wanted, keys, strict=True)
        ]
        group = np.where(numbers[0].notna(), "study: " + wanted[0], "context: " + wanted[1])
        return Controls(
            mean,
            numbers[0].fillna(numbers[1]).to_numpy(),
            pd.factorize(group)[0],
            *self._spread(controls, keys[0], values),
        )

    def _spread(
        self, controls: pd.DataFrame, key: pd.Series, values: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """(standard deviation (G,), degrees of freedom) by context, of controls around the mean of their context and study."""
        frame, context = (
            pd.DataFrame(values, dtype=np.float64),
            contexts(controls, self.declared).to_numpy(),
        )
        squares = (
            (frame - frame.groupby(key.to_numpy()).transform("mean")).pow(2).groupby(context).sum()
        )
        of_context = key.groupby(context)
        freedom = (of_context.size() - of_context.nunique()).loc[lambda number: number > 0]
        return {
            name: np.sqrt(squares.loc[name].to_numpy() / number) for name, number in freedom.items()
        }, freedom.to_dict()

    def _perturbed_centres(self) -> Means | None:
        """Per context, else over all: every training perturbation counts once, however many samples it has."""
        treated = ~is_control(self.train, self.declared).to_numpy()
        if self.declared.control is None or not treated.any():
            return None
        rows = self.train[treated]
        pairs = pd.DataFrame(self.train_expression[treated]).groupby(
            joined([contexts(rows, self.declared), rows[self.declared.control.column]]).to_numpy()
        )
        first = rows.iloc[[positions[0] for positions in pairs.indices.values()]]
        centroids = pairs.mean().loc[list(pairs.indices)].to_numpy()
        return Means.fit(self._places(first), centroids)

    def _places(self, rows: pd.DataFrame) -> list[pd.Series]:
        return [contexts(rows, self.declared), pd.Series("all", index=rows.index)]


def condition_names(samples: pd.DataFrame, cohort: Cohort) -> pd.Series:
    """Context, perturbation, dose and time of each sample, as one text."""
    declared = cohort.declared
    return joined(
        [contexts(samples, declared), *(samples[name] for name in declared.covariates.perturbation)]
    )
