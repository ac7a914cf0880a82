"""How a fit goes through its samples: batches, epochs, regularisation, learning rate, weight of the divergence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.gem.common.config import Train

_WARMUP_SHARE = 0.25  # of the one-cycle schedule: where the learning rate peaks
_START_RATE = 0.04  # of the peak: where it starts
_SMALLEST_BATCH = 8
_MOST_DROPOUT = 0.15  # of metadata in a small cohort


@dataclass(frozen=True)
class Plan:
    """How a fit goes through its samples."""

    batch_size: int
    epochs: int
    patience: int  # epochs
    weight_decay: float
    metadata_dropout: Mapping[str, float]

    @classmethod
    def of(cls, samples: int, params: Train) -> "Plan":
        """As params.yaml says, unless that makes fewer than `min_steps` steps: then smaller batches, then more epochs and patience.

        A hundred samples in batches of 64 would make 60 steps in 30 epochs, and the model would hardly leave its start. Regularisation
        is a prior, which weighs the more the fewer samples there are: below `small_cohort` it grows in proportion.
        """
        scarcity = max(1.0, params.small_cohort / samples)
        dropout = {
            group: max(given, min(given * scarcity, _MOST_DROPOUT))
            for group, given in params.metadata_dropout.model_dump().items()
        }
        wanted = samples * params.epochs // max(1, params.min_steps)
        batch_size = (
            min(params.batch_size, max(wanted, _SMALLEST_BATCH))
            if params.min_steps
            else params.batch_size
        )
        epochs = max(params.epochs, -(-params.min_steps // -(-samples // batch_size)))
        return cls(
            batch_size,
            epochs,
            -(-params.patience * epochs // params.epochs),
            params.weight_decay * scarcity,
            dropout,
        )


def kl_warmup(step: int, steps: int, share: float) -> float:
    """From 0 to 1 over the first `share` of the steps, linearly."""
    return 1.0 if share == 0 else min(1.0, step / (share * steps))


def one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to zero (Smith & Topin 2019)."""
    peak = max(1.0, _WARMUP_SHARE * steps)
    if step < peak:
        return _START_RATE + (1 - _START_RATE) * step / peak
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - peak) / max(1.0, steps - peak))))
