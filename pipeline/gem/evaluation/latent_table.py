"""What each latent group of a trained model knows: labels that it should, labels that it should not, dimensions in use.

N samples, L latent dimensions of a group.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from pipeline.gem.common.config import GROUPS
from pipeline.gem.data.labels import label_texts
from pipeline.gem.model.calibration import calibration_error
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.latent_probe import (
    active_units,
    balanced_accuracy,
    leakage,
    majority_accuracy,
)

COLUMNS = [
    "predictor",
    "measure",
    "group",
    "covariate",
    "covariate_group",
    "value",
    "chance",
    "reason",
]


def latent_table(
    gem: TrainedGEM, predictor: str, samples: pd.DataFrame, expression: np.ndarray, seed: int
) -> pd.DataFrame:
    """Rows of measures on observed samples (N, G) that training never saw.

    accuracy: balanced, of each label head on the posterior mean, beside that of naming the commonest class.
    calibration_error: of the heads' calibrated probabilities, mean gap between confidence and share that is right.
    probe: balanced accuracy of a linear probe that reads a covariate from a group's latents; where the covariate belongs
    to another group, this is leakage. active_units: dimensions of a group in use.
    """
    posterior = gem.posterior(expression)
    means = posterior.mean.cpu().numpy().astype(np.float64)
    groups = {group: means[:, place] for group, place in gem.network.slices().items()}
    rows = [*_head_rows(gem, samples, posterior.mean), *_probe_rows(gem, samples, groups, seed)]
    rows += [
        {"measure": "active_units", "group": group, "value": active_units(latents)}
        for group, latents in groups.items()
    ]
    return pd.DataFrame([{"predictor": predictor} | row for row in rows], columns=COLUMNS)


def _head_rows(gem: TrainedGEM, samples: pd.DataFrame, means: torch.Tensor) -> Iterator[dict]:
    labels = gem.metadata.labels(samples)
    for name, chances in gem.probabilities(means).items():
        known = bool((labels[name] >= 0).any())
        about = {
            "group": gem.metadata.group_of(name),
            "covariate": name,
            "covariate_group": gem.metadata.group_of(name),
        }
        about["reason"] = "" if known else "no sample has a label that training knows"
        values = {
            "accuracy": (
                balanced_accuracy(labels[name], chances.argmax(axis=1)),
                majority_accuracy(labels[name]),
            ),
            "calibration_error": (calibration_error(chances, labels[name]), None),
        }
        for measure, (value, chance) in values.items():
            yield {
                "measure": measure,
                "value": value if known else None,
                "chance": chance if known else None,
            } | about


def _probe_rows(
    gem: TrainedGEM, samples: pd.DataFrame, groups: dict[str, np.ndarray], seed: int
) -> Iterator[dict]:
    for owner in GROUPS:
        for field in gem.metadata.groups[owner]:
            if field.covariate.kind not in ("categorical", "embedding"):
                continue
            labels = pd.factorize(label_texts(samples[field.name]))[0]
            for group, latents in groups.items():
                found = leakage(latents, labels, seed)
                about = {
                    "measure": "probe",
                    "group": group,
                    "covariate": field.name,
                    "covariate_group": owner,
                }
                yield about | {
                    "value": found.accuracy,
                    "chance": found.chance,
                    "reason": found.reason,
                }
