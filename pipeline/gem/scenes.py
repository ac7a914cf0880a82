"""What a test split looks like to predictors and to metrics: its samples, their references, controls on either side.

N samples of a split, G genes, C conditions. Expression is log-CPM.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.baselines import Means
from pipeline.gem.cohort import Cohort
from pipeline.gem.config import Evaluate
from pipeline.gem.references import choose_references, matching_keys
from pipeline.gem.splits import TEST_CONTROL, TESTS, TRAIN, Entities, contexts, is_control, joined

# What a split holds out as a whole: errors within one are not independent.
HELD_OUT = {"test_combination": "pair", "test_perturbation": "perturbation", "test_study": "study"}

RESIDUALS = 50   # controls of a context at most that stand for its spread


@dataclass(frozen=True)
class Scene:
    """The scored samples of one split and what surrounds them."""

    name: str
    samples: pd.DataFrame                 # (N, ...)
    counts: np.ndarray                    # (N, G)
    observed: np.ndarray                  # (N, G)
    reference: np.ndarray | None          # (N, G) log-CPM of each sample's reference
    reference_samples: pd.DataFrame | None  # (N, ...) and its metadata
    observed_control: np.ndarray | None   # (N, G) matched controls that no predictor saw
    predicted_control: np.ndarray | None  # (N, G) matched controls of training, disjoint from those
    reference_control: np.ndarray | None  # (N, G) the same for predictors that see a reference: with a new study's own
    observed_residuals: dict[str, np.ndarray]   # by context, controls (m, G) around their matched mean: what no treatment looks like
    predicted_residuals: dict[str, np.ndarray]  # the same of training
    context: np.ndarray                   # (N,) names of what each sample belongs to; "" for none
    study: np.ndarray
    perturbation: np.ndarray
    pair: np.ndarray
    condition_name: np.ndarray
    perturbed_centre: np.ndarray | None   # (N, G) mean of the training perturbations' centroids: Systema's reference
    target: np.ndarray                    # (N,) position of the perturbation's target gene, -1 without
    condition: np.ndarray                 # (N,) index of context, perturbation, dose and time
    entity: np.ndarray                    # (N,) index of what the split holds out: a pair, perturbation or study; else the condition
    entity_kind: str
    treated: np.ndarray                   # (N,) not a control

    @property
    def totals(self) -> np.ndarray:
        """(N,) total counts over all genes of the source."""
        return self.samples["total"].to_numpy()


class Scenes:
    """A cohort opened once: the training split as every baseline sees it, and its test splits."""

    def __init__(self, cohort: Cohort, params: Evaluate):
        self.cohort, self.params, self.declared = cohort, params, cohort.declared
        self.train = cohort.rows([TRAIN])
        self.train_expression = cohort.expression([TRAIN])
        self._centres = self._perturbed_centres()

    def __iter__(self) -> Iterator[Scene]:
        for name in TESTS:
            if self.cohort.has(name):
                yield self.scene(name)

    def scene(self, name: str) -> Scene:
        """A test split by name."""
        samples, expression = self.cohort.rows([name]), self.cohort.expression([name])
        control = is_control(samples, self.declared).to_numpy()
        given = self._given(name, control)
        scored = ~given
        rows = samples[scored]
        shown, shown_expression = pd.concat([self.train, samples[given]]), np.concatenate([self.train_expression, expression[given]])
        hidden, hidden_expression = self._hidden_controls(name, samples, expression, control & scored)
        chosen = choose_references(rows, shown, self.declared, self.params.seed)
        conditions = condition_names(rows, self.cohort)
        condition = pd.factorize(conditions)[0]
        entities = Entities.of(rows, self.declared)
        held_out = getattr(entities, HELD_OUT[name]).fillna("control") if name in HELD_OUT else None
        return Scene(
            name=name,
            samples=rows,
            counts=self.cohort.counts([name])[scored],
            observed=expression[scored],
            reference=None if chosen is None else shown_expression[chosen],
            reference_samples=None if chosen is None else shown.iloc[chosen],
            observed_control=self._matched(rows, hidden, hidden_expression),
            predicted_control=self._matched(rows, *self._controls(self.train, self.train_expression)),
            reference_control=self._matched(rows, *self._controls(shown, shown_expression)),
            observed_residuals=self._residuals(hidden, hidden_expression),
            predicted_residuals=self._residuals(*self._controls(self.train, self.train_expression)),
            **{kind: getattr(entities, kind).fillna("").to_numpy(dtype=object) for kind in ("context", "study", "perturbation", "pair")},
            condition_name=conditions.to_numpy(),
            perturbed_centre=None if self._centres is None else self._centres.lookup(self._places(rows)),
            target=self.cohort.target_positions(rows),
            condition=condition,
            entity=condition if held_out is None else pd.factorize(held_out)[0],
            entity_kind="condition" if held_out is None else HELD_OUT[name],
            treated=~control[scored],
        )

    def _given(self, name: str, control: np.ndarray) -> np.ndarray:
        """(N,) which samples a predictor may see: half of the controls that a new study brings; the others are the observed side."""
        if name != "test_study":
            return np.zeros(len(control), dtype=bool)
        rng = np.random.default_rng(self.params.seed)
        return control & (rng.random(len(control)) < 0.5)

    def _hidden_controls(self, name: str, samples: pd.DataFrame, expression: np.ndarray, own: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
        if name == "test_study":
            return samples[own], expression[own]
        return self.cohort.rows([TEST_CONTROL]), self.cohort.expression([TEST_CONTROL])

    def _controls(self, samples: pd.DataFrame, expression: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
        control = is_control(samples, self.declared)
        return samples[control], expression[control]

    def _matched(self, rows: pd.DataFrame, controls: pd.DataFrame, expression: np.ndarray) -> np.ndarray | None:
        """(N, G) mean of the controls of each row's context and study, else context; None where some row has none."""
        if not len(controls):
            return None
        means = Means.fit(matching_keys(controls, self.declared)[1:], expression).lookup(matching_keys(rows, self.declared)[1:])
        return None if np.isnan(means).any() else means

    def _residuals(self, controls: pd.DataFrame, expression: np.ndarray) -> dict[str, np.ndarray]:
        """By context, controls less the mean of those of their study and context, at most RESIDUALS of them."""
        if not len(controls):
            return {}
        key = matching_keys(controls, self.declared)[1].to_numpy()
        frame = pd.DataFrame(expression)
        grouped = frame.groupby(key)
        number = grouped[0].transform("size").to_numpy()
        # A mean of n takes a share of the spread with it: what is left is scaled up to it.
        scale = np.sqrt(number / np.maximum(number - 1, 1))[:, None]
        residuals = (frame - grouped.transform("mean")).to_numpy() * scale
        usable = number > 1
        context = contexts(controls, self.declared).to_numpy()
        return {name: residuals[usable & (context == name)][:RESIDUALS] for name in np.unique(context)}

    def _perturbed_centres(self) -> Means | None:
        """Per context, else over all: every training perturbation counts once, however many samples it has."""
        treated = ~is_control(self.train, self.declared).to_numpy()
        if self.declared.control is None or not treated.any():
            return None
        rows = self.train[treated]
        pairs = pd.DataFrame(self.train_expression[treated]).groupby(joined([contexts(rows, self.declared), rows[self.declared.control.column]]).to_numpy())
        first = rows.iloc[[positions[0] for positions in pairs.indices.values()]]
        centroids = pairs.mean().loc[list(pairs.indices)].to_numpy()
        return Means.fit(self._places(first), centroids)

    def _places(self, rows: pd.DataFrame) -> list[pd.Series]:
        return [contexts(rows, self.declared), pd.Series("all", index=rows.index)]


def condition_names(samples: pd.DataFrame, cohort: Cohort) -> pd.Series:
    """Context, perturbation, dose and time of each sample, as one text."""
    declared = cohort.declared
    return joined([contexts(samples, declared), *(samples[name] for name in declared.covariates.perturbation)])
