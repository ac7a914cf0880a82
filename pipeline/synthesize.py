"""Writes a synthetic cohort with a known truth.

Reads   params.yaml: synthesize
Writes  data/synthetic/: samples.parquet, genes.parquet, counts/*.parquet, embeddings/, targets.parquet, truth/
Run     python -m pipeline.synthesize     (a few seconds for 8,000 x 1,000; memory: one chunk of samples)
"""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize, read_params
from pipeline.gem.common.errors import exit_with
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.shards import ShardWriter
from pipeline.gem.simulation.generator import Truth, draw_counts, draw_truth
from pipeline.gem.simulation.study_design import draw_design, expected_log_fractions

OUTPUT = Path("data/synthetic")
CHUNK_VALUES = 2**23  # counts generated at a time: 64 MB an array of float64


def main() -> None:
    write_source(read_params().synthesize, OUTPUT)


def write_source(params: Synthesize, folder: Path) -> None:
    """The whole cohort source, in memory of one chunk of samples."""
    rng = np.random.default_rng(params.seed)
    truth = draw_truth(params, rng)
    design = draw_design(params, truth, rng)
    folder.mkdir(parents=True, exist_ok=True)
    design.samples.to_parquet(folder / "samples.parquet", index=False)
    pd.DataFrame({"gene_id": truth.gene_id}).to_parquet(folder / "genes.parquet", index=False)
    truth.save(folder / "truth")
    hidden = pd.DataFrame(
        {"stratum": design.stratum, "donor": design.donor, "library_size": design.library_size}
    )
    hidden.insert(0, "sample_id", design.samples["sample_id"])
    hidden.to_parquet(folder / "truth" / "samples.parquet", index=False)
    write_perturbation_tables(truth, folder)

    rows = max(1, CHUNK_VALUES // params.genes)
    progress = Progress("synthesize", params.samples, "samples")
    with ShardWriter(folder / "counts", "counts", np.dtype(np.uint32)) as writer:
        for start in range(0, params.samples, rows):
            chunk = slice(start, start + rows)
            counts = draw_counts(
                expected_log_fractions(truth, design, chunk),
                design.library_size[chunk],
                truth.dispersion,
                rng,
            )
            writer.write(design.samples["sample_id"].to_numpy()[chunk], counts)
            progress.advance(len(counts))
    progress.done(f"{params.samples:,} samples x {params.genes:,} genes in {folder}")


def write_perturbation_tables(truth: Truth, folder: Path) -> None:
    """What is public of a perturbation: its observable features, and the target gene of a genetic one."""
    names = np.array(truth.perturbations)
    (folder / "embeddings").mkdir(exist_ok=True)
    features = pd.DataFrame(
        truth.embedding[1:],
        columns=[f"feature_{index + 1}" for index in range(truth.embedding.shape[1])],
    )
    features.insert(0, "perturbation", names[1:])
    features.to_parquet(folder / "embeddings" / "perturbation.parquet", index=False)
    genetic = truth.target >= 0
    targets = pd.DataFrame(
        {"perturbation": names[genetic], "gene_id": truth.gene_id[truth.target[genetic]]}
    )
    targets.to_parquet(folder / "targets.parquet", index=False)


if __name__ == "__main__":
    exit_with(main)
