"""What a trial is judged by: figures of a fitted model on the choice split, comparable across settings. Never a test split."""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.gem.common.errors import DivergedError, InputError
from pipeline.gem.model.latent_probe import leakage
from pipeline.gem.search.search_config import BY_EPOCH
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import FitResult, posterior_terms

_SEED = 0  # of posterior draws and of the probe: the same for every trial


def figures_of(fit: FitResult, data: TrainingData, metrics: tuple[str, ...]) -> dict[str, float]:
    """The named figures of the chosen epoch, in nats per sample where they are likelihoods. DivergedError where one is not finite."""
    found = {metric: _figure(metric, fit, data) for metric in metrics}
    broken = [metric for metric, value in found.items() if not np.isfinite(value)]
    if broken:
        raise DivergedError(f"{', '.join(broken)} of the choice split is not finite")
    return found


def _figure(metric: str, fit: FitResult, data: TrainingData) -> float:
    if metric in BY_EPOCH:
        return getattr(fit.best, f"validation_{metric}")
    return {
        "reconstruction_log_likelihood": reconstruction_log_likelihood,
        "leakage": mean_leakage,
    }[metric](fit, data)


@torch.no_grad()
def reconstruction_log_likelihood(fit: FitResult, data: TrainingData) -> float:
    """E_q[log p(x | z)], one posterior draw per sample, mean over samples; nats."""
    generator = torch.Generator(data.validation.expression.device).manual_seed(_SEED)
    return float(
        -posterior_terms(fit.gem.network, data.validation, generator)["nll_reconstruction"]
    )


def mean_leakage(fit: FitResult, data: TrainingData) -> float:
    """How well linear probes read labels from the latents of groups that should not have them, mean over label and group.

    Of a probe: (balanced accuracy - chance) / (1 - chance), not below 0; 0: nothing leaks, 1: everything does.
    """
    means = fit.gem.posterior(data.validation.expression.cpu().numpy()).mean.cpu().numpy()
    shares = []
    for owner, labels in _labels(data):
        for group, place in fit.gem.network.slices().items():
            found = leakage(means[:, place], labels, _SEED) if group != owner else None
            if found and found.accuracy is not None:
                shares.append(max(0.0, (found.accuracy - found.chance) / (1 - found.chance)))
    if not shares:
        raise InputError(
            "leakage cannot be measured: no covariate has two labels with samples enough in the choice split; judge by another metric"
        )
    return float(np.mean(shares))


def _labels(data: TrainingData) -> Iterator[tuple[str, np.ndarray]]:
    """(group, (N,) level or -1) of every covariate with levels to tell apart, read back from its encoding."""
    for group, fields in data.encoder.groups.items():
        encoded = data.validation.metadata[group][data.validation.index[group]].cpu().numpy()
        start = 0
        for field in fields:
            named = encoded[:, start + field.described : start + field.size]
            start += field.size
            if field.covariate.kind in ("categorical", "embedding") and len(field.levels) > 1:
                yield group, np.where(named.any(axis=1), named.argmax(axis=1), -1)
