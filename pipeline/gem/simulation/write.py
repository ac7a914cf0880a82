"""Writes a synthetic cohort source in the memory of one chunk of samples."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize
from pipeline.gem.common.files import folder_replacement, write_table
from pipeline.gem.common.progress import Progress
from pipeline.gem.data.shards import ShardWriter
from pipeline.gem.simulation.generator import draw_counts, draw_truth
from pipeline.gem.simulation.study_design import StudyDesign, draw_design
from pipeline.gem.simulation.truth import Truth

CHUNK_VALUES = 2**23  # counts generated at a time: 64 MB for an array of float64


def write_source(params: Synthesize, folder: Path) -> None:
    """Draws a cohort and writes its samples, genes, counts, perturbation tables and truth.

    An earlier source in `folder` stays as it is until the new one is complete.
    """
    progress = Progress("synthesize", params.samples, "samples")
    with folder_replacement(folder) as temporary:
        _write_source(params, temporary, progress)
    progress.done(f"{params.samples:,} samples x {params.genes:,} genes in {folder}")


def _write_source(params: Synthesize, folder: Path, progress: Progress) -> None:
    rng = np.random.default_rng(params.seed)
    truth = draw_truth(params, rng)
    design = draw_design(params, truth, rng)
    _write_tables(truth, design, folder)
    rows = max(1, CHUNK_VALUES // params.genes)
    names = design.samples["sample_id"].to_numpy()
    with ShardWriter(folder / "counts", "counts", np.dtype(np.uint32)) as writer:
        for start in range(0, params.samples, rows):
            chunk = slice(start, start + rows)
            log_fraction, library_size = (
                design.log_fractions(truth, chunk),
                design.library_size[chunk],
            )
            counts = draw_counts(log_fraction, library_size, truth.dispersion, rng)
            writer.write(names[chunk], counts)
            progress.advance(len(counts))


def _write_tables(truth: Truth, design: StudyDesign, folder: Path) -> None:
    """The public tables (samples, genes, perturbation features, target genes) and the truth."""
    truth.save(folder / "truth")
    names, genetic = np.array(truth.perturbations), truth.target >= 0
    columns = [f"feature_{index + 1}" for index in range(truth.embedding.shape[1])]
    features = pd.DataFrame(truth.embedding[1:], columns=columns)
    features.insert(0, "perturbation", names[1:])
    target_genes = truth.gene_id[truth.target[genetic]]
    hidden = {"stratum": design.stratum, "donor": design.donor, "library_size": design.library_size}
    if design.subpopulation is not None:
        hidden["subpopulation"] = design.subpopulation
    tables = {
        "samples": design.samples,
        "genes": pd.DataFrame({"gene_id": truth.gene_id}),
        "embeddings/perturbation": features,
        "targets": pd.DataFrame({"perturbation": names[genetic], "gene_id": target_genes}),
        "truth/samples": pd.DataFrame({"sample_id": design.samples["sample_id"]} | hidden),
    }
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table)
