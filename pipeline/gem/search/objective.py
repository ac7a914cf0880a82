"""One trial of a search or of its confirmation: fits with the seeds it is asked for, judged on the choice split, in a run of its own."""

import math
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import DivergedError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.objectives import figures_of
from pipeline.gem.search.samplers import Values
from pipeline.gem.search.search import note_epochs, shortened
from pipeline.gem.search.search_config import BY_EPOCH, SearchConfig
from pipeline.gem.search.trial_queue import Pruned, RunningTrial
from pipeline.gem.tracking import runs
from pipeline.gem.tracking.training_run import MODEL_PARAMETERS
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import EpochMetrics, fit


@dataclass(frozen=True)
class Trials:
    """What all trials of a call share; `parent` is the tracker's run of the study, `digest` the hash of the data."""

    study: str
    question: SearchConfig
    params: Params
    data: TrainingData
    digest: str
    parent: str
    interruption: StopSignal

    def search(self, asked: RunningTrial) -> float | list[float]:
        name = f"{self.study} trial {asked.number}"
        return self._run(
            asked,
            name,
            asked.values,
            self.question.epochs,
            self.question.seeds,
            {"trial": asked.number},
        )

    def confirm(
        self, asked: RunningTrial, candidates: dict[int, Values], epochs: int
    ) -> float | list[float]:
        trial, seed = asked.values["trial"], asked.values["seed"]
        values = candidates[trial]
        name, about = (
            f"{self.study} confirm {trial} seed {seed}",
            {"confirmed_trial": trial, "seed": seed},
        )
        return self._run(asked, name, values, epochs, (seed,), about)

    def _run(
        self,
        asked: RunningTrial,
        name: str,
        values: Values,
        epochs: int,
        seeds: tuple[int, ...],
        about: dict,
    ) -> float | list[float]:
        metrics = tuple(objective.metric for objective in self.question.objectives)
        with runs.run(name, "tune", parent=self.parent, killed_by=(Pruned, StoppedError)) as run:
            asked.note_run(run.id)
            tried = _valid(shortened(self.params, epochs), values)
            run.params(tried.flat(*MODEL_PARAMETERS) | log10_twins(self.question, values) | about)
            run.dataset("cohort", self.digest, "training")
            found = self._fits(asked, run, tried, seeds, metrics)
            means = {metric: float(np.mean([one[metric] for one in found])) for metric in metrics}
            run.metrics({f"best/{metric}": value for metric, value in means.items()})
            return means[metrics[0]] if len(metrics) == 1 else list(means.values())

    def _fits(
        self,
        asked: RunningTrial,
        run: runs.Run,
        tried: Params,
        seeds: tuple[int, ...],
        metrics: tuple[str, ...],
    ) -> list[dict[str, float]]:
        """The figures of each seed. The first seed's curve is recorded, and is what pruning looks at."""
        spent, planned, found = 0, tried.train.epochs, []
        reported = (
            f"validation_{metrics[0]}" if len(metrics) == 1 and metrics[0] in BY_EPOCH else None
        )

        def on_epoch(epoch: EpochMetrics) -> None:
            nonlocal spent, planned
            spent, planned = spent + 1, epoch.epochs
            if not found:
                with self.interruption.deferred():
                    run.metrics(epoch.metrics(), step=epoch.epoch)
                    if reported:
                        asked.report(getattr(epoch, reported), epoch.epoch)

        try:
            for seed in seeds:
                with self.interruption.allowed():
                    finished = fit(self.data, tried, seed, on_epoch)
                    found.append(figures_of(finished, self.data, metrics))
        finally:
            note_epochs(asked, spent, planned * len(seeds))
        return found


def _valid(params: Params, changes: Values) -> Params:
    """DivergedError where values that are fine one by one are not together: this trial fails, and others go on."""
    try:
        return params.override(changes)
    except ValidationError as error:
        raise DivergedError(f"no settings for a model: {error.errors()[0]['msg']}") from None


def log10_twins(question: SearchConfig, values: Values) -> dict[str, float]:
    """MLflow's axes are linear: a log-scaled parameter is recorded a second time as its logarithm."""
    return {
        f"log10.{name}": math.log10(values[name])
        for name, space in question.space.items()
        if name in values and getattr(space, "log", False)
    }
