"""Random changes of training samples, so that incomplete metadata and new studies are nothing
unusual at prediction: masked fields and simulated batch effects.

U distinct metadata rows, E entries, C columns, R samples, G genes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.data.encoder import FieldColumns, MetadataEncoder
from pipeline.gem.model.metadata.rows import MetadataRows


@dataclass(frozen=True)
class Fields:
    """Which field each column of a group belongs to."""

    number: int
    of_column: Tensor  # (C,) int64; one entry if the group has no column
    is_identity: Tensor  # (C,) bool: levels of labels that have features
    any_identity: bool

    @classmethod
    def by_group(cls, encoder: MetadataEncoder, device: torch.device) -> dict[str, "Fields"]:
        return {group: cls.of(encoder.columns(group), device) for group in encoder.groups}

    @classmethod
    def of(cls, columns: list[FieldColumns], device: torch.device) -> "Fields":
        # Without columns too, rows are filled with entries of value 0 in column 0.
        width = max(1, columns[-1].features.stop if columns else 0)
        of_column, is_identity = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=bool)
        for number, part in enumerate(columns):
            of_column[part.own] = of_column[part.features] = number
            is_identity[part.own] = part.field.features is not None
        tensors = (torch.from_numpy(array).to(device) for array in (of_column, is_identity))
        return cls(len(columns), *tensors, bool(is_identity.any()))


def dropout_fields(
    metadata: MetadataRows,
    fields: Fields,
    field_rate: float,
    identity_rate: float,
    generator: torch.Generator,
) -> MetadataRows:
    """The rows with parts set to missing at random: whole fields with probability `field_rate`, and
    only the identity of labels with features with `identity_rate`."""
    if fields.number == 0 or (field_rate == 0 and (identity_rate == 0 or not fields.any_identity)):
        return metadata
    shape, device = (2, len(metadata), fields.number), metadata.values.device
    uniform = torch.rand(*shape, generator=generator, device=device)
    keep_field = uniform[0] >= field_rate
    keep_identity = keep_field & (uniform[1] >= identity_rate)
    row, field = metadata.row(), fields.of_column[metadata.columns]
    is_identity = fields.is_identity[metadata.columns]
    keep = torch.where(is_identity, keep_identity[row, field], keep_field[row, field])
    return metadata.scale(keep)


def mask_fields(metadata: MetadataRows, fields: Fields, generator: torch.Generator) -> MetadataRows:
    """The rows with fields set to missing at random. The probability is drawn per row from [0, 1],
    so every number of fields is equally likely."""
    if fields.number == 0:
        return metadata
    rows, device = len(metadata), metadata.values.device
    rate = torch.rand(rows, 1, generator=generator, device=device)
    keep = torch.rand(rows, fields.number, generator=generator, device=device) >= rate
    return metadata.scale(keep[metadata.row(), fields.of_column[metadata.columns]])


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
