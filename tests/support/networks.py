"""Small networks and batches in general position."""

from collections.abc import Mapping

import torch
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.gem.common.config import Categorical
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.network import Network
from pipeline.gem.model.objective import Batch, LatentNoise
from pipeline.gem.model.observation import Observed

GENES = 9
LATENTS, TECHNICAL_LATENTS = 7, 2  # of the fixture `small_model`
METADATA_SIZES = {"technical": 3, "biological": 4, "perturbation": 2}
HEADS = {"tissue": ("biological", 3), "sex": ("biological", 2), "perturbation": ("perturbation", 4)}


def untrained_network(params, genes=GENES, sizes=METADATA_SIZES, heads=HEADS) -> Network:
    """A network as it starts; the first column of the perturbation is an intervention column."""
    columns = [column == 0 for column in range(sizes["perturbation"])]
    return Network(genes, covariates(sizes), heads, columns, params)


def covariates(sizes: Mapping[str, int]) -> dict[str, list[CovariateEncoder]]:
    """One covariate of so many levels per group, none for zero."""
    return {group: [levels(group, number)] if number else [] for group, number in sizes.items()}


def levels(name: str, number: int) -> CovariateEncoder:
    names = tuple(f"{level:06}" for level in range(number))
    return CovariateEncoder(name, Categorical(kind="categorical"), names)


def sparse(dense: Tensor) -> MetadataRows:
    """Rows with the values of a matrix (U, C)."""
    return MetadataRows.from_sparse(csr_array(dense.numpy()), dense.device)


def dense(rows: MetadataRows, columns: int) -> Tensor:
    """(U, C)"""
    matrix = torch.zeros(len(rows), columns)
    return matrix.index_put((rows.row(), rows.columns), rows.values, accumulate=True)


def network(params, genes=GENES, sizes=METADATA_SIZES, heads=HEADS, seed=0) -> Network:
    """A network in general position: weights that start at zero are moved away from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = untrained_network(params, genes, sizes, heads)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def latent_noise(size: int, seed: int = 0) -> LatentNoise:
    """Standard Normal draws for all terms, drawn in the order of the fields."""
    generator = torch.Generator().manual_seed(seed)
    widths = LATENTS, LATENTS, LATENTS, TECHNICAL_LATENTS
    return LatentNoise(*(torch.randn(size, width, generator=generator) for width in widths))


def batch(size=6, genes=GENES, sizes=METADATA_SIZES, heads=HEADS, seed=1) -> Batch:
    """A batch with every optional part; each group has four distinct metadata rows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows, columns):
        return torch.rand(rows, columns, generator=generator)

    def binary(rows, columns):
        return sparse((uniform(rows, columns) < 0.5).float())

    def integers(low, high):
        return torch.randint(low, high, (size,), generator=generator)

    def targets():
        """(size, 2) none, one or two distinct genes."""
        first = integers(-1, genes)
        return torch.stack([first, torch.where(first > 2, first - 3, -1)], dim=1)

    labels = [integers(-1, classes) for _, classes in heads.values()]
    return Batch(
        observed=Observed(5 * uniform(size, genes)),
        noise=latent_noise(size),
        reference=5 * uniform(size, genes),
        batch_effect=torch.randn(size, genes, generator=generator),
        target_gene=targets(),
        unseen_study=binary(4, sizes["technical"]),
        partial_metadata={group: sparse(torch.zeros(4, width)) for group, width in sizes.items()},
        metadata={group: binary(4, width) for group, width in sizes.items()},
        index={group: integers(0, 4) for group in sizes},
        labels=torch.stack(labels, 1) if labels else torch.zeros(size, 0, dtype=torch.long),
    )
