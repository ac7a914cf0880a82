"""The ideal predictors of a simulated cohort, from its known truth.

N samples of a split, G genes. Expression is log-CPM.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from pipeline.gem.data.expression import log_cpm
from pipeline.gem.evaluation.evaluation_split import (
    NO_REFERENCE,
    EvaluationSplit,
    EvaluationSplits,
    PredictedSplit,
)
from pipeline.gem.evaluation.metrics import rank_pit
from pipeline.gem.simulation.generator import log_fractions
from pipeline.gem.simulation.oracle import (
    CHANGED_FOLD,
    MetadataOracle,
    OmniscientOracle,
    ReferenceControls,
    true_effects,
)
from pipeline.gem.simulation.truth import Truth

EVERY = slice(None)  # sample of a split
RANK_DRAWS = 9  # the rank of an observation among nine draws falls into one of ten bins


class OraclePredictors:
    """The oracles of the simulation as predictors of a test split."""

    def __init__(self, splits: EvaluationSplits):
        folder = splits.cohort.truth_folder
        self.truth, self.seed = Truth.load(folder), splits.params.seed
        self.genes = pd.Index(self.truth.gene_id).get_indexer(splits.cohort.genes)
        self.hidden = pd.read_parquet(folder / "samples.parquet").set_index("sample_id")
        # They know what the samples that predictors see can show: else they are no ceiling.
        visible = splits.visible.samples
        self.studies = set(visible["study"].dropna())
        perturbations = set(visible["perturbation"].dropna())
        self.metadata = MetadataOracle(self.truth, self.studies, perturbations, visible)
        self.omniscient = OmniscientOracle(self.metadata.expectations)
        self._latest: tuple[EvaluationSplit, PredictedSplit] | None = None  # of `from_metadata`

    def by_name(self) -> dict[str, Callable[[EvaluationSplit], list[PredictedSplit]]]:
        return {
            "oracle_metadata": self.from_metadata,
            "oracle_reference": self.from_reference,
            "oracle_omniscient": self.from_truth,
        }

    def true_change(self, split: EvaluationSplit) -> tuple[np.ndarray, np.ndarray]:
        """((N, G) bool whether the perturbation changes a gene by a fifth or more, (N, G) log
        fold change)."""
        change = true_effects(self.truth, split.samples)[:, self.genes]
        return np.abs(change) >= np.log(CHANGED_FOLD), change

    def from_metadata(self, split: EvaluationSplit) -> list[PredictedSplit]:
        predicted = self._predict(split, EVERY, self.metadata, split.samples, split.totals)
        self._latest = (split, predicted)
        return [predicted]

    def from_reference(self, split: EvaluationSplit) -> list[PredictedSplit]:
        if split.reference_samples is None:
            return [PredictedSplit(None, reason=NO_REFERENCE)]
        if self._latest is None or self._latest[0] is not split:
            self.from_metadata(split)
        # A reference adds nothing for a study of the visible samples: the same prediction.
        predicted = replace(self._latest[1], uses_study_controls=True)
        new = ~split.samples["study"].isin(self.studies).to_numpy()
        if not new.any():
            return [predicted]
        references = split.reference_samples[new]
        controls = ReferenceControls(references, *self._strata_and_donors(references))
        inputs = split.samples[new], split.totals[new], controls
        own = self._predict(split, new, self.metadata, *inputs)
        arrays = {}
        for name in ("values", "draw", "pit"):
            arrays[name] = getattr(predicted, name).copy()
            arrays[name][new] = getattr(own, name)
        return [replace(predicted, **arrays)]

    def from_truth(self, split: EvaluationSplit) -> list[PredictedSplit]:
        factors = self._strata_and_donors(split.samples)
        if self.truth.subpopulation is not None:
            hidden = self.hidden.loc[split.samples["sample_id"]]
            factors = (*factors, hidden["subpopulation"].to_numpy())
        fractions = log_fractions(self.truth, split.samples, *factors)
        predicted = self._predict(split, EVERY, self.omniscient, fractions, split.totals)
        return [replace(predicted, uses_study_controls=True)]

    def _strata_and_donors(self, samples: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        hidden = self.hidden.loc[samples["sample_id"]]
        return hidden["stratum"].to_numpy(), hidden["donor"].to_numpy()

    def _predict(
        self,
        split: EvaluationSplit,
        rows: np.ndarray | slice,
        oracle: MetadataOracle | OmniscientOracle,
        *inputs,
    ) -> PredictedSplit:
        """Of some samples of a split. `inputs`: the arguments of the oracle's `predict` and
        `draw`."""
        values = oracle.predict(*inputs)[:, self.genes].astype(np.float32)
        rng = np.random.default_rng(self.seed)
        drawn = oracle.draw(*inputs, rng=rng)
        one_draw = log_cpm(drawn, drawn.sum(axis=1))[:, self.genes]
        ranked = split.pit_genes
        genes = self.genes[ranked]
        more = (oracle.draw(*inputs, rng=rng, genes=genes) for _ in range(RANK_DRAWS - 1))
        draws = itertools.chain([drawn[:, genes]], more)
        pit = rank_pit(split.counts[rows][:, ranked].astype(np.int64), draws, rng)
        return PredictedSplit(values, one_draw, pit)
