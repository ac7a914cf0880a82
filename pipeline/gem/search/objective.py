"""The objective function of a search: fits a trial and returns its metrics of the selection split.

The metrics are comparable between settings, and never of a test split. Likelihoods are in nats per
sample.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch
from pydantic import ValidationError

from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import DivergedError, InputError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.model.latent_probe import linear_probe
from pipeline.gem.search.search import with_epochs
from pipeline.gem.search.search_config import EPOCH_METRICS, SearchConfig, Values
from pipeline.gem.search.trial_queue import RUN, RunningTrial
from pipeline.gem.tracking import runs
from pipeline.gem.tracking.runs import FIT_SECTIONS, Run
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import EpochMetrics, FitResult, fit
from pipeline.gem.training.validation import posterior_means, posterior_terms

_SEED = 0  # of posterior draws and of the probe: the same for every trial


@dataclass(frozen=True)
class FitSettings:
    """The fits of a trial, and the name of its MLflow run."""

    run_name: str
    values: Values
    epochs: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class ObjectiveFunction:
    """Evaluates trials, each in an MLflow run below `parent_run`. An interrupted trial continues
    in its run, after the last epoch that `checkpoints` has of it. `digest` is the data's hash."""

    search: str
    config: SearchConfig
    params: Params
    data: TrainingData
    digest: str
    parent_run: str
    stop: StopSignal
    checkpoints: Path

    def evaluate(self, trial: RunningTrial) -> float | list[float]:
        """The mean of each objective over the seeds of the search."""
        name = f"{self.search} trial={trial.number}"
        settings = FitSettings(name, trial.values, self.config.epochs, self.config.seeds)
        return self._evaluate(trial, settings, {"trial": trial.number})

    def confirm(self, pair: RunningTrial, values: Values, epochs: int) -> float | list[float]:
        """The objectives of a candidate, which has `values`, with a fresh seed. The values of
        `pair` are the numbers of the candidate and the seed."""
        trial, seed = pair.values["trial"], pair.values["seed"]
        name = f"{self.search} confirmation trial={trial} seed={seed}"
        settings = FitSettings(name, values, epochs, (seed,))
        return self._evaluate(pair, settings, {"confirmed_trial": trial, "seed": seed})

    def _evaluate(
        self, trial: RunningTrial, settings: FitSettings, labels: dict[str, int]
    ) -> float | list[float]:
        with self._open_run(trial, settings.run_name) as run:
            params = _override(with_epochs(self.params, settings.epochs), settings.values)
            log10 = log10_params(self.config, settings.values)
            run.log_params(params.flat(*FIT_SECTIONS) | log10 | labels)
            run.log_dataset("cohort", self.digest, "training")
            fits = self._fit(trial, run, params, settings.seeds)
            means = [float(np.mean([fit[name] for fit in fits])) for name in self.config.metrics]
            best = zip(self.config.metrics, means, strict=True)
            run.log_metrics({f"best/{name}": value for name, value in best})
            return means if len(means) > 1 else means[0]

    def _open_run(self, trial: RunningTrial, name: str) -> Run:
        key = runs.kept_key(trial.run, lambda key: trial.set_attributes(**{RUN: key}))
        killed_by = (optuna.TrialPruned, StoppedError)
        return Run.open(name, "tune", parent=self.parent_run, key=key, killed_by=killed_by)

    def _fit(
        self, trial: RunningTrial, run: Run, params: Params, seeds: tuple[int, ...]
    ) -> list[dict[str, float]]:
        """The metrics of each seed. The curve of the first seed is logged, and decides pruning."""
        trained, metrics = 0, []
        names = self.config.metrics
        prunable = len(names) == 1 and names[0] in EPOCH_METRICS
        checkpoints = [Checkpoint.of(params, self.digest, seed, self.checkpoints) for seed in seeds]

        def on_epoch(epoch: EpochMetrics) -> None:
            nonlocal trained
            trained += 1
            trial.record_epochs(trained, epoch.epochs * len(seeds))
            if metrics:
                return
            run.log_metrics(epoch.metrics(), step=epoch.epoch)
            if prunable:
                trial.report(getattr(epoch, f"validation_{names[0]}"), epoch.epoch)

        with _discarded_at_the_end(checkpoints):
            for seed, checkpoint in zip(seeds, checkpoints, strict=True):
                result = fit(self.data, params, seed, on_epoch, checkpoint, self.stop.check)
                metrics.append(selection_metrics(result, self.data, names))
        return metrics


@contextmanager
def _discarded_at_the_end(checkpoints: list[Checkpoint]) -> Iterator[None]:
    """Removes the checkpoints of a trial that is decided: complete, pruned or failed. After any
    other exception (a stop, a failure of the machine) the trial continues from them."""
    try:
        yield
    except (optuna.TrialPruned, DivergedError):
        _discard(checkpoints)
        raise
    _discard(checkpoints)


def _discard(checkpoints: list[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        checkpoint.path.unlink(missing_ok=True)


def _override(params: Params, values: Values) -> Params:
    """Values can be allowed one by one but not together. Raises DivergedError, so that only this
    trial fails."""
    try:
        return params.override(values)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise DivergedError(f"the values exclude each other: {message}") from None


def log10_params(config: SearchConfig, values: Values) -> dict[str, float]:
    """The logarithms of log-scaled parameters, because MLflow's axes are linear."""
    return {
        f"log10.{name}": math.log10(values[name])
        for name, space in config.space.items()
        if name in values and getattr(space, "log", False)
    }


def selection_metrics(
    result: FitResult, data: TrainingData, names: tuple[str, ...]
) -> dict[str, float]:
    """Metrics of the best epoch on the selection split. Raises DivergedError if not finite."""
    metrics = {}
    for name in names:
        if name in EPOCH_METRICS:
            metrics[name] = getattr(result.best, f"validation_{name}")
        elif name == "latent_leakage":
            metrics[name] = latent_leakage(result, data)
        else:
            metrics[name] = reconstruction_log_likelihood(result, data)
    infinite = [name for name, value in metrics.items() if not np.isfinite(value)]
    if infinite:
        raise DivergedError(f"{', '.join(infinite)} of the selection split is not finite")
    return metrics


@torch.no_grad()
def reconstruction_log_likelihood(result: FitResult, data: TrainingData) -> float:
    """E_q[log p(x | z)] by one posterior draw per sample, mean over samples; nats."""
    generator = torch.Generator(data.validation.expression.device).manual_seed(_SEED)
    total = 0.0
    for samples in data.validation.blocks():
        terms = posterior_terms(result.gem.network, samples, generator)
        total -= float(terms["nll_reconstruction"]) * len(samples.observed)
    return total / len(data.validation)


def latent_leakage(result: FitResult, data: TrainingData) -> float:
    """How well linear probes predict labels from latents of groups that should not encode them.

    The mean over label and group of (balanced accuracy - chance) / (1 - chance), at least 0. 0: no
    leakage, 1: every label is predicted.
    """
    means = posterior_means(result.gem.network, data.validation).cpu().numpy()
    scores = []
    for owner, labels in _labels(data):
        for group, columns in result.gem.network.slices().items():
            if group == owner:
                continue
            probe = linear_probe(means[:, columns], labels, _SEED)
            if probe.accuracy is not None:
                scores.append(max(0.0, (probe.accuracy - probe.chance) / (1 - probe.chance)))
    if not scores:
        raise InputError(
            "latent_leakage cannot be computed: no covariate has two labels with enough samples "
            "in the selection split; choose another metric"
        )
    return float(np.mean(scores))


def _labels(data: TrainingData) -> Iterator[tuple[str, np.ndarray]]:
    """(group, (N,) level or -1 if missing) of each covariate with several levels, decoded from
    its encoding."""
    for group in data.encoder.groups:
        rows, index = data.validation.metadata[group], data.validation.index[group]
        columns, row, index = (part.cpu().numpy() for part in (rows.columns, rows.row(), index))
        for part in data.encoder.columns(group):
            if part.field.covariate.kind in ("categorical", "embedding") and (
                len(part.field.levels) > 1
            ):
                levels = np.full(len(rows), -1)
                own = (columns >= part.own.start) & (columns < part.own.stop)
                # Of several labels the first: it is written last.
                levels[row[own][::-1]] = columns[own][::-1] - part.own.start
                yield group, levels[index]
