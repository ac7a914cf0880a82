"""What all tests share: places, tiny parameters."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"  # real cohorts, present on some machines only

TINY = {
    "synthesize.samples": 600,
    "synthesize.genes": 60,
    "synthesize.studies": 10,
    "synthesize.tissues": 2,
    "synthesize.cell_types_per_tissue": 2,
    "synthesize.perturbations": 8,
    "synthesize.perturbations_per_study": 5,
    "synthesize.mechanisms": 4,
    "synthesize.embedding_size": 3,
    "splits.combination": 0.1,
    "splits.validation_combination": 0.1,
    "splits.perturbation": 0.13,
    "splits.study": 0.1,
    "model.latent.technical": 4,
    "model.latent.biological": 4,
    "model.latent.perturbation": 4,
    "model.hidden": 32,
    "model.blocks": 1,
    "model.prior_blocks": 0,
    "train.epochs": 6,
    "train.min_steps": 0,
    "train.batch_size": 32,
    "train.threads": 1,
    "train.predictive_draws": 4,
    "tune.trials": 3,
    "evaluate.bootstrap": 50,
    "evaluate.prior_draws": 4,
}


def at_source(folder: Path) -> dict[str, object]:
    """The parameters that point at a synthetic source folder."""
    return {
        "data.source": str(folder),
        "data.target_gene": str(folder / "targets.parquet"),
        "data.covariates.perturbation.perturbation.table": str(
            folder / "embeddings" / "perturbation.parquet"
        ),
    }
