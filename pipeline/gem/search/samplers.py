"""Optuna's distributions, samplers and pruners for the definition of a search."""

import itertools
import random
from collections.abc import Callable

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial

from pipeline.gem.search.search_config import SearchConfig, Values
from pipeline.gem.search.space import CategoricalSpace, IntegerSpace, Space
from pipeline.gem.search.trial_queue import POINT

MAX_DUPLICATE_PROPOSALS = 10  # after these a new point is drawn at random


def distribution(space: Space) -> BaseDistribution:
    if isinstance(space, CategoricalSpace):
        return CategoricalDistribution(space.choices)
    if isinstance(space, IntegerSpace):
        return IntDistribution(space.low, space.high, log=space.log, step=space.step)
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def suggest(trial: Trial, config: SearchConfig) -> Values:
    """The point of a trial: a value of every active key, in the order of the space."""
    values: Values = {}
    for name, space in config.space.items():
        if config.is_active(name, values):
            values[name] = _suggest_value(trial, name, space)
    return values


def _suggest_value(trial: Trial, name: str, space: Space) -> object:
    if isinstance(space, CategoricalSpace):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntegerSpace):
        return trial.suggest_int(name, space.low, space.high, log=space.log, step=space.step)
    return trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)


class UniquePointSampler(optuna.samplers.BaseSampler):
    """Samples whole points with the configured sampler and rejects those that were proposed before.

    After MAX_DUPLICATE_PROPOSALS rejections it draws a new point at random. The state of a sampler
    is not stored: it is seeded with the number of the trial. So a point depends on the number and
    the trials before it, and a resumed search does not repeat its points. The first points of an
    adaptive sampler depend on the number alone, so that any number of workers has the same ones.
    """

    def __init__(self, config: SearchConfig, proposed_points: Callable[[], list[Values]]):
        self._config, self._proposed_points = config, proposed_points
        self._space = {name: distribution(space) for name, space in config.space.items()}

    def before_trial(self, study, trial) -> None:
        seed = (self._config.sampler.seed + 1_000_003 * trial.number) % 2**32
        self._rng = random.Random(seed)
        self._uniform = optuna.samplers.RandomSampler(seed=seed)
        self._base = _base_sampler(self._config, seed, trial.number)
        self._base.before_trial(study, trial)

    def infer_relative_search_space(self, study, trial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Values:
        if POINT in trial.user_attrs:
            return trial.user_attrs[POINT]
        proposed = self._proposed_points()
        if self._config.sampler.name == "grid":
            # Shuffled, so that half a grid is not a corner of it.
            points = self._config.points()
            random.Random(self._config.sampler.seed).shuffle(points)
            return next(point for point in points if point not in proposed)
        for _ in range(MAX_DUPLICATE_PROPOSALS):
            point = self._sample_point(self._base, study, trial)
            if point not in proposed:
                return point
        if (points := self._config.points()) is not None:
            return self._rng.choice([point for point in points if point not in proposed])
        while (point := self._sample_point(self._uniform, study, trial)) in proposed:
            pass
        return point

    def _sample_point(
        self, sampler: optuna.samplers.BaseSampler, study: optuna.Study, trial: FrozenTrial
    ) -> Values:
        # QMC covers the whole space from its first point on. The other samplers infer the space
        # that they can relate from the trials.
        is_qmc = isinstance(sampler, optuna.samplers.QMCSampler)
        space = self._space if is_qmc else sampler.infer_relative_search_space(study, trial)
        related = sampler.sample_relative(study, trial, space)
        values: Values = {}
        for name, dist in self._space.items():
            if not self._config.is_active(name, values):
                continue
            if name in related:
                values[name] = related[name]
            else:
                values[name] = sampler.sample_independent(study, trial, name, dist)
        return values

    def sample_independent(self, study, trial, param_name, param_distribution) -> object:
        return self._uniform.sample_independent(study, trial, param_name, param_distribution)


class _QMCSampler(optuna.samplers.QMCSampler):
    """One sequence for all workers and calls, from a position that depends on the trial alone.
    Optuna would continue after the last position of any worker, also of one that died."""

    def __init__(self, seed: int, position: int):
        super().__init__(seed=seed, scramble=True)
        self._positions = itertools.count(position)

    def _find_sample_id(self, study, search_space) -> int:
        return next(self._positions)


def _base_sampler(config: SearchConfig, seed: int, number: int) -> optuna.samplers.BaseSampler:
    sampler = config.sampler
    if sampler.name == "qmc" or number <= getattr(sampler, "startup_trials", 0):
        return _QMCSampler(sampler.seed, number - 1)  # trial 0 is the baseline
    match sampler.name:
        case "tpe":
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=sampler.startup_trials,
                multivariate=True,
                constant_liar=True,
                group=any(space.when for space in config.space.values()),
            )
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=sampler.startup_trials)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=sampler.startup_trials)
    return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(config: SearchConfig) -> optuna.pruners.BasePruner:
    pruner = config.pruner
    match pruner.name:
        case "median":
            return optuna.pruners.MedianPruner(pruner.startup_trials, pruner.warmup_epochs)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                pruner.min_epochs, config.epochs, pruner.reduction
            )
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(pruner.min_epochs, pruner.reduction)
    return optuna.pruners.NopPruner()
