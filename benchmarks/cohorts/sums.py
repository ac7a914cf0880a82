"""Sums of cells: a source with one sample per condition, and the simple predictors fitted on it.

A mean of logarithms over cells depends on their depth; the logarithm of a sum does not. The rivals
of GEM on sums are therefore fitted on sums, of all cells of a condition and study (and of a level
of data.level_column).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.cohorts.rivals import rival_predictions
from pipeline.gem.common.config import Data, Evaluate, Splits
from pipeline.gem.common.files import write_atomically
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.labels import LabelForm, label_key
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.data.sources import Source
from pipeline.gem.evaluation.catalogue import BASELINES
from pipeline.gem.evaluation.evaluation_split import EvaluationSplit, EvaluationSplits
from pipeline.gem.evaluation.predictors import Predictors
from pipeline.gem.preparation.prepare import write_cohort


@dataclass(frozen=True)
class SummedSource:
    """The sums of the samples of each condition and study (and level), as a Source."""

    samples: pd.DataFrame
    genes: pd.DataFrame
    columns: list[str]
    advice: str
    counts: np.ndarray  # (conditions, G)

    @classmethod
    def of(cls, source: Source, data: Data) -> "SummedSource":
        groups = SampleGroups(LabelForm.of(data).table(source.samples), data)
        keys = groups.condition.astype(str) + "\n" + groups.study.astype(str)
        if data.level_column is not None:
            keys += "\n" + label_key(groups.samples[data.level_column]).astype(str)
        code, _ = pd.factorize(keys.to_numpy(), sort=True)
        counts = np.zeros((code.max() + 1, len(source.genes)), dtype=np.int64)
        for rows, block in source.chunks():
            np.add.at(counts, code[rows], block.astype(np.int64))
        first = pd.Series(code).drop_duplicates().sort_values().index
        samples = source.samples.iloc[first].reset_index(drop=True)
        return cls(samples, source.genes, source.columns, source.advice, counts)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.arange(len(self.counts)), self.counts


def summed_predictions(
    source: Source, cohort: Cohort, data: Data, splits: Splits, evaluate: Evaluate, folder: Path
) -> tuple[EvaluationSplits, Predictors]:
    """The simple predictors, fitted on the sums of the samples outside the held-out split, on the
    genes of `cohort`. Writes a cohort below `folder`."""
    genes = folder / "genes.txt"
    write_atomically(genes, "\n".join(cohort.genes).encode() + b"\n")
    technical = data.covariates.technical
    kept = {name: item for name, item in technical.items() if name == data.study_column}
    changes = {
        "covariates": data.covariates.model_copy(update={"technical": kept}),
        "gene_list": str(genes),
        "min_gene_samples": 0,
        "min_gene_total": 0,
        "highly_variable": None,
    }
    data = data.model_copy(update=changes)
    write_cohort(SummedSource.of(source, data), data, splits, folder / "sums")
    sums = EvaluationSplits(Cohort(folder / "sums"), evaluate)
    return sums, Predictors(sums, {})


def by_condition(
    split: EvaluationSplit, predictors: Predictors
) -> dict[str, dict[str, np.ndarray]]:
    """Predictor to condition to log-CPM (G,) of its sum."""
    predictions = {
        name: predictors.by_name[name](split) for name in BASELINES if name in predictors.by_name
    }
    codes = split.condition
    return {
        name: {
            split.condition_name[np.flatnonzero(codes == code)[0]]: _mean(
                of_seed.values, codes == code
            )
            for code in np.unique(codes)
        }
        for name, (of_seed,) in predictions.items()
    }


def summed_rivals(cohort: Cohort, split: EvaluationSplit) -> dict[str, dict[str, np.ndarray]]:
    """The same of the rivals, fitted on the sums of `cohort`."""
    treated = split.samples[split.treated]
    held_out = dict(list(treated.groupby(split.condition_name[split.treated], sort=False)))
    return rival_predictions(cohort, held_out)


def _mean(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of studies, which have a sum each."""
    return values[rows].mean(axis=0)
