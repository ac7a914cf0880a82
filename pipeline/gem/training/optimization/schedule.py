"""Batches, epochs and weight decay of a fit; learning rate and KL weight by step."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.gem.common.config import Train

_REFIT_RATE = 1 / 3  # peak learning rate of a refit, relative to that of the fit
_PEAK_SHARE = 0.25  # of the one-cycle schedule: the steps before the peak of the learning rate
_INITIAL_RATE = 0.04  # relative to the peak
_MIN_BATCH_SIZE = 8
_REFERENCE_BATCH_SIZE = 64  # of the learning rate, weight decay and betas
_EPOCH_STEPS = 48  # larger batches leave so many
_BETAS = 0.9, 0.999


@dataclass(frozen=True)
class TrainingSchedule:
    """Batch size, epochs and weight decay, adapted to the number of training samples."""

    batch_size: int
    learning_rate: float  # its peak
    betas: tuple[float, float]  # of Adam
    epochs: int
    patience: int  # epochs
    weight_decay: float
    kl_warmup: float  # fraction of the steps
    stage: Literal["train", "refit"] = "train"

    @classmethod
    def of(cls, samples: int, params: Train) -> "TrainingSchedule":
        """As in params.yaml, unless that makes fewer than `min_steps` steps: then smaller batches,
        then more epochs and patience.

        A hundred samples in batches of 64 would make 60 steps in 30 epochs, too few to train.

        Batches have more than 64 samples only where an epoch then has 48 steps or more. Adam's
        settings follow their size, so that an epoch has the same effect (Malladi et al. 2022, the
        square root scaling rule).
        """
        batch_size = params.batch_size
        if params.min_steps:
            largest = samples * params.epochs // params.min_steps
            largest = min(largest, max(samples // _EPOCH_STEPS, _REFERENCE_BATCH_SIZE))
            batch_size = min(batch_size, max(largest, _MIN_BATCH_SIZE))
        epochs = max(params.epochs, -(-params.min_steps // -(-samples // batch_size)))
        patience = -(-params.patience * epochs // params.epochs)
        growth = max(1.0, batch_size / _REFERENCE_BATCH_SIZE)
        return cls(
            batch_size,
            params.learning_rate * math.sqrt(growth),
            tuple(max(0.0, 1 - growth * (1 - beta)) for beta in _BETAS),
            epochs,
            patience,
            params.weight_decay * math.sqrt(growth),
            params.kl_warmup,
        )

    def of_refit(self, samples: int, params: Train) -> "TrainingSchedule":
        """Of a model that was trained with this schedule: `refit` times the epochs, and half of the
        least number of steps, with a lower learning rate and the whole KL from the first step."""
        steps_per_epoch = -(-samples // self.batch_size)
        least = math.ceil(params.min_steps / 2 / steps_per_epoch)
        epochs = max(math.ceil(params.refit * self.epochs), least)
        return replace(
            self,
            epochs=epochs,
            patience=epochs,
            learning_rate=_REFIT_RATE * self.learning_rate,
            kl_warmup=0.0,
            stage="refit",
        )


def kl_warmup(step: int, steps: int, share: float) -> float:
    """From 0 to 1 over the first `share` of the steps, linearly."""
    return 1.0 if share == 0 else min(1.0, step / (share * steps))


def one_cycle(step: int, steps: int) -> float:
    """Learning rate relative to its peak: a linear rise, then half a cosine down to zero
    (Smith & Topin 2019)."""
    peak = max(1.0, _PEAK_SHARE * steps)
    if step < peak:
        return _INITIAL_RATE + (1 - _INITIAL_RATE) * step / peak
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - peak) / max(1.0, steps - peak))))
