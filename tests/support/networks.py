"""Small networks and batches in general position."""

import torch

from pipeline.gem.model.network import Batch, Network
from pipeline.gem.model.observation import Observed

GENES = 9
METADATA_SIZES = {"technical": 3, "biological": 4, "perturbation": 2}
HEADS = {"tissue": ("biological", 3), "sex": ("biological", 2), "perturbation": ("perturbation", 4)}


def build(genes, sizes, heads, model) -> Network:
    """Untrained, as it starts: the first column of the perturbation says how it is done."""
    return Network(
        genes, sizes, heads, tuple(column == 0 for column in range(sizes["perturbation"])), model
    )


def network(model, genes=GENES, sizes=METADATA_SIZES, heads=HEADS, seed=0) -> Network:
    """A network in general position: no weight that starts at zero stays there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build(genes, sizes, heads, model)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def batch(size=6, genes=GENES, sizes=METADATA_SIZES, heads=HEADS, seed=1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        observed=Observed(5 * torch.rand(size, genes, generator=generator)),
        reference=5 * torch.rand(size, genes, generator=generator),
        shift=torch.randn(size, genes, generator=generator),
        target=torch.randint(-1, genes, (size,), generator=generator),
        new_study=(torch.rand(4, sizes["technical"], generator=generator) < 0.5).float(),
        short={group: torch.zeros(4, width) for group, width in sizes.items()},
        metadata={
            group: (torch.rand(4, width, generator=generator) < 0.5).float()
            for group, width in sizes.items()
        },
        index={group: torch.randint(0, 4, (size,), generator=generator) for group in sizes},
        labels=torch.stack(
            [
                torch.randint(-1, classes, (size,), generator=generator)
                for _, classes in heads.values()
            ],
            1,
        )
        if heads
        else torch.zeros(size, 0, dtype=torch.long),
    )
