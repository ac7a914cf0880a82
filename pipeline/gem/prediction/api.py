"""The public Python API: a trained model that predicts, classifies and reconstructs pandas frames.

N rows, G genes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction.predictor import Prediction, Reconstruction, Request, reconstruct
from pipeline.gem.prediction.query_table import DistinctRows, QueryFrame, as_table, check_query
from pipeline.gem.prediction.reference_samples import ReferenceFile


class GEM(TrainedGEM):
    """A trained model with its methods for pandas frames."""

    def predict(
        self, query: pd.DataFrame, *, reference: pd.DataFrame | Path | str | None = None, **how
    ) -> pd.DataFrame:
        """A table of experiments with what each would measure: the query's columns, `extrapolated`, then a column of whole counts
        per gene, so that `model.predict(query)[model.genes]` is the matrix. The index is the query's.

        `reference` are samples to start from: raw counts, a row per sample and a column per gene, or a file as on the command
        line; the query's column `reference_id` chooses one by its name. `how`, with the names and defaults of the command
        line: mode, samples, total_count, seed, unknown, conditioning, deterministic_latents, latents, interval; lists
        (latents, ends of intervals) are arrays in cells. InputError lists everything that is wrong.
        """
        return predict(self, query, reference, how)

    def classify(self, counts: pd.DataFrame | Path | str) -> pd.DataFrame:
        """What samples are, from raw counts (a row per sample, a column per gene; or a file): per label head the likeliest
        label and, in `<head>_probability`, its calibrated probability."""
        return classified(self, counts)

    def reconstruct(
        self, counts: pd.DataFrame | Path | str, *, total_count: int = 1_000_000
    ) -> pd.DataFrame:
        """(samples, genes) whole counts of samples encoded and decoded: what the model can hold of them."""
        return reconstructed(self, counts, total_count)


def predict(
    gem: TrainedGEM,
    query: pd.DataFrame,
    reference: pd.DataFrame | Path | str | None,
    how: Mapping[str, object],
) -> pd.DataFrame:
    """As GEM.predict says; `how` are the fields of a Request."""
    request = Request(**how)
    table = as_table(query)
    clash = [name for name in query.columns if str(name) in set(gem.genes)]
    if clash:
        raise InputError(f"query: columns {examples(clash)} are named as genes; rename them")
    file = None if reference is None else opened(gem, reference)
    check_query(QueryFrame(table), gem, request.unknown, None if file is None else file.names)
    prediction = Prediction([gem], request, None if file is None else file.read())
    parts, start = [], 0
    for block in QueryFrame(table).blocks(prediction.rows):
        for said in prediction.blocks(DistinctRows.of(block, prediction.columns)):
            added: dict[str, object] = {"extrapolated": said.extrapolated}
            if request.samples > 1:
                added["sample"] = said.sample
            added |= _lists({f"latent_{group}": values for group, values in said.latents.items()})
            added |= _lists({} if said.low is None else {"low": said.low, "high": said.high})
            asked = query.iloc[start + said.row]
            counts = pd.DataFrame(said.counts, columns=gem.genes, index=asked.index)
            parts.append(pd.concat([asked, pd.DataFrame(added, index=asked.index), counts], axis=1))
        start += len(block)
    return pd.concat(parts)


def classified(gem: TrainedGEM, counts: pd.DataFrame | Path | str) -> pd.DataFrame:
    """As GEM.classify says."""
    file = opened(gem, counts)
    return pd.concat([_labels(file, block) for block in reconstruct(gem, file, None)])


def reconstructed(
    gem: TrainedGEM, counts: pd.DataFrame | Path | str, total_count: int
) -> pd.DataFrame:
    """As GEM.reconstruct says."""
    file = opened(gem, counts)
    return pd.concat(
        [
            pd.DataFrame(block.counts, columns=gem.genes, index=_index(file, block))
            for block in reconstruct(gem, file, total_count)
        ]
    )


def opened(gem: TrainedGEM, reference: pd.DataFrame | Path | str) -> ReferenceFile:
    return (
        ReferenceFile.of_frame(reference, gem)
        if isinstance(reference, pd.DataFrame)
        else ReferenceFile.open(reference, gem)
    )


def _labels(file: ReferenceFile, block: Reconstruction) -> pd.DataFrame:
    named: dict[str, np.ndarray] = {}
    for name, labels in block.labels.items():
        named |= {name: labels, f"{name}_probability": block.probabilities[name]}
    return pd.DataFrame(named, index=_index(file, block))


def _index(file: ReferenceFile, block: Reconstruction) -> pd.Index:
    return pd.Index(file.names[block.row], name="sample_id")


def _lists(columns: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    return {name: list(values) for name, values in columns.items()}
