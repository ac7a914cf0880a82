"""The public Python API: a trained model with methods for pandas frames.

N rows, G genes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction import predictor
from pipeline.gem.prediction.predictor import Predictor, Request
from pipeline.gem.prediction.query_table import QueryFrame
from pipeline.gem.prediction.reference_samples import ReferenceFile

Counts = pd.DataFrame | Path | str  # raw counts: a row per sample and a column per gene, or a file


class GEM(TrainedGEM):
    """A trained model that predicts, classifies and reconstructs frames."""

    def predict(
        self, query: pd.DataFrame, *, reference: Counts | None = None, **options
    ) -> pd.DataFrame:
        """Predicts the counts of experiments, one per row of the query.

        Returns the columns and the index of the query, then `extrapolated`, then a column of whole
        counts per gene: `model.predict(query)[model.genes]` is the (N, G) matrix. Latents and
        intervals are arrays in cells, in columns `latent_<group>`, `low` and `high`.

        `reference` are samples to start from; the column `reference_id` of the query selects one
        by name. `options` are the fields of `Request`: mode, draws, total_count, seed, unknown,
        conditioning, deterministic_latents, latents, interval. InputError lists all problems.
        """
        request = Request(**options)
        clash = [name for name in query.columns if str(name) in set(self.genes)]
        if clash:
            raise InputError(f"query: columns {examples(clash)} have names of genes; rename them")
        references = None if reference is None else self._reference_file(reference)
        frames = []
        for block in Predictor([self], request, references).blocks(QueryFrame.of(query)):
            rows = query.iloc[block.row]
            names = ("extrapolated", "draw") if request.draws > 1 else ("extrapolated",)
            added = {name: block.columns[name].to_numpy() for name in names}
            added |= _cells({f"latent_{name}": values for name, values in block.latents.items()})
            added |= _cells(block.interval)
            counts = pd.DataFrame(block.counts, columns=self.genes, index=rows.index)
            frames.append(pd.concat([rows, pd.DataFrame(added, index=rows.index), counts], axis=1))
        return pd.concat(frames)

    def classify(self, counts: Counts) -> pd.DataFrame:
        """For each label head the likeliest label, and its calibrated probability in
        `<head>_probability`. The index is the name of the sample."""
        samples = self._reference_file(counts)
        blocks = predictor.classify(self, samples)
        return pd.concat([pd.DataFrame(labels, samples.index(rows)) for rows, labels, _ in blocks])

    def reconstruct(self, counts: Counts, *, total_count: int = 1_000_000) -> pd.DataFrame:
        """(N, G) whole counts of samples that are encoded and decoded."""
        samples = self._reference_file(counts)
        blocks = predictor.reconstruct(self, samples, total_count)
        return pd.concat(
            [pd.DataFrame(part.counts, samples.index(part.row), self.genes) for part in blocks]
        )

    def _reference_file(self, counts: Counts) -> ReferenceFile:
        if isinstance(counts, pd.DataFrame):
            return ReferenceFile.of_frame(counts, self)
        return ReferenceFile.open(counts, self)


def _cells(columns: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    return {name: list(values) for name, values in columns.items()}
