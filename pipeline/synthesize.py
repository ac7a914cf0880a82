"""Writes a synthetic cohort with a known truth.

Reads   params.yaml: synthesize
Writes  data/synthetic/: samples.parquet, genes.parquet, counts/*.parquet, embeddings/*.parquet, truth/
Run     python -m pipeline.synthesize     (a few seconds for 8,000 x 1,000; memory: one chunk of samples)
"""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.config import read_params
from pipeline.gem.errors import exit_with
from pipeline.gem.progress import Progress
from pipeline.gem.shards import ShardWriter
from pipeline.gem.simulator import draw_counts, draw_design, draw_truth, log_fractions

OUTPUT = Path("data/synthetic")
CHUNK_VALUES = 2**23  # counts generated at a time: 64 MB an array of float64


def main() -> None:
    params = read_params().synthesize
    rng = np.random.default_rng(params.seed)
    truth = draw_truth(params, rng)
    design = draw_design(params, truth, rng)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    design.samples.to_parquet(OUTPUT / "samples.parquet", index=False)
    pd.DataFrame({"gene_id": truth.gene_id}).to_parquet(OUTPUT / "genes.parquet", index=False)
    truth.save(OUTPUT / "truth")
    hidden = pd.DataFrame({"stratum": design.stratum, "donor": design.donor, "library_size": design.library_size})
    hidden.insert(0, "sample_id", design.samples["sample_id"])
    hidden.to_parquet(OUTPUT / "truth" / "samples.parquet", index=False)
    write_embeddings(truth)

    rows = max(1, CHUNK_VALUES // params.genes)
    progress = Progress("synthesize", len(design.samples), "samples")
    with ShardWriter(OUTPUT / "counts", "counts", np.dtype(np.uint32)) as writer:
        for start in range(0, len(design.samples), rows):
            chunk = slice(start, start + rows)
            counts = draw_counts(log_fractions(truth, design, chunk), design.library_size[chunk], truth.dispersion, rng)
            writer.write(design.samples["sample_id"].to_numpy()[chunk], counts)
            progress.advance(len(counts))
    progress.done(f"{len(design.samples)} samples x {params.genes} genes in {OUTPUT}")


def write_embeddings(truth) -> None:
    """The observable features of every perturbation, one row each, keyed by its name."""
    folder = OUTPUT / "embeddings"
    folder.mkdir(exist_ok=True)
    table = pd.DataFrame(truth.embedding[1:], columns=[f"feature_{index + 1}" for index in range(truth.embedding.shape[1])])
    table.insert(0, "perturbation", truth.perturbations[1:])
    table.to_parquet(folder / "perturbation.parquet", index=False)


if __name__ == "__main__":
    exit_with(main)
