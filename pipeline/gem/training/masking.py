"""Random changes of training samples, so that incomplete metadata and new studies are nothing
unusual at prediction: masked fields and simulated batch effects.

U distinct metadata rows, D columns, R samples, G genes. `blocks` are those of
MetadataEncoder.blocks: (feature columns, identity columns) of each field.
"""

import torch
from torch import Tensor


def dropout_fields(
    metadata: Tensor,
    blocks: list[tuple[int, int]],
    field_rate: float,
    identity_rate: float,
    generator: torch.Generator,
) -> Tensor:
    """Metadata rows (U, D) with parts set to missing at random: whole fields with probability
    `field_rate`, and only the identity of labels with features with `identity_rate`."""
    sizes = torch.tensor([size for block in blocks for size in block], device=metadata.device)
    has_identities = any(identity for _, identity in blocks)
    if metadata.shape[1] == 0 or (field_rate == 0 and (identity_rate == 0 or not has_identities)):
        return metadata
    shape = 2, len(metadata), len(blocks)
    uniform = torch.rand(*shape, generator=generator, device=metadata.device)
    keep_field = uniform[0] >= field_rate
    keep_identity = keep_field & (uniform[1] >= identity_rate)
    keep = torch.stack([keep_field, keep_identity], dim=2).flatten(1)
    return metadata * keep.repeat_interleave(sizes, dim=1)


def mask_fields(
    metadata: Tensor, blocks: list[tuple[int, int]], generator: torch.Generator
) -> Tensor:
    """Metadata rows (U, D) with fields set to missing at random. The probability is drawn per row
    from [0, 1], so every number of fields is equally likely."""
    if metadata.shape[1] == 0:
        return metadata
    sizes = torch.tensor([sum(block) for block in blocks], device=metadata.device)
    rows, fields = len(metadata), len(blocks)
    rate = torch.rand(rows, 1, generator=generator, device=metadata.device)
    keep = torch.rand(rows, fields, generator=generator, device=metadata.device) >= rate
    return metadata * keep.repeat_interleave(sizes, dim=1)


def simulate_batch_effects(
    samples: int, share: float, spread: Tensor, generator: torch.Generator
) -> Tensor:
    """(R, G) log-CPM: for a `share` of the samples an effect as of a new study, zero for the rest.

    An effect has the standard deviation `spread` (G,) between studies, scaled by a uniform factor
    from 0 to 1.5 per sample.
    """
    uniform = torch.rand(samples, 2, generator=generator, device=spread.device)
    scale = torch.where(uniform[:, 0] < share, 1.5 * uniform[:, 1], 0.0)
    noise = torch.randn(samples, len(spread), generator=generator, device=spread.device)
    return scale[:, None] * spread * noise
