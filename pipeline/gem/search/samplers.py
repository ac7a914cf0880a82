"""How a search proposes points and gives up on trials: Optuna's samplers and pruners, as a study file names them."""

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

from pipeline.gem.search.search_config import (
    Choice,
    Halving,
    IntegerSpace,
    Median,
    SearchConfig,
    Space,
)

Values = dict[str, object]
_PATIENCE = 10  # proposals of points that are there already, before a new one is drawn at random


def distribution(space: Space) -> BaseDistribution:
    if isinstance(space, Choice):
        return CategoricalDistribution(space.choices)
    if isinstance(space, IntegerSpace):
        return IntDistribution(space.low, space.high, log=space.log, step=space.step or 1)
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def suggest(trial: Trial, question: SearchConfig) -> Values:
    """The point of a trial: the keys that are asked, in the order of the space."""
    values: Values = {}
    for name, space in question.space.items():
        if question.is_asked(name, values):
            values[name] = _suggest_one(trial, name, space)
    return values


def _suggest_one(trial: Trial, name: str, space: Space) -> object:
    if isinstance(space, Choice):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntegerSpace):
        return trial.suggest_int(name, space.low, space.high, log=space.log, step=space.step or 1)
    return trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)


class Distinct(optuna.samplers.BaseSampler):
    """Asks another sampler for whole points until one is new; after _PATIENCE of them it draws a new one at random.

    A sampler's own state is not stored: it is seeded by the number of the trial, so that no resume repeats its points.
    """

    def __init__(self, question: SearchConfig, number: int, known: Callable[[], list[Values]]):
        self._question, self._known = question, known
        self._space = {name: distribution(space) for name, space in question.space.items()}
        seed = (question.sampler.seed + 1_000_003 * number) % 2**32
        self._random = random.Random(seed)
        self._uniform = optuna.samplers.RandomSampler(seed=seed)
        self._base = _base(question, seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Values:
        known = self._known()
        if self._question.sampler.name == "grid":
            # In an order of its own: half a grid should not be a corner of it.
            points = self._question.points()
            random.Random(self._question.sampler.seed).shuffle(points)
            return next(point for point in points if point not in known)
        for _ in range(_PATIENCE):
            point = self._point(self._base, study, trial)
            if point not in known:
                return point
        points = self._question.points()
        if points is not None:
            return self._random.choice([point for point in points if point not in known])
        while (point := self._point(self._uniform, study, trial)) in known:
            pass
        return point

    def _point(
        self, sampler: optuna.samplers.BaseSampler, study: optuna.Study, trial: FrozenTrial
    ) -> Values:
        # A low-discrepancy sequence covers the space from its first point on; the others learn the space from the trials.
        quasi = isinstance(sampler, optuna.samplers.QMCSampler)
        related = sampler.sample_relative(
            study,
            trial,
            self._space if quasi else sampler.infer_relative_search_space(study, trial),
        )
        values: Values = {}
        for name, one in self._space.items():
            if self._question.is_asked(name, values):
                values[name] = (
                    related[name]
                    if name in related
                    else sampler.sample_independent(study, trial, name, one)
                )
        return values

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> object:
        return self._uniform.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._base.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: optuna.trial.TrialState,
        values: list[float] | None,
    ) -> None:
        self._base.after_trial(study, trial, state, values)


def _base(question: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    asked = question.sampler
    match asked.name:
        case "tpe":
            conditional = any(space.when for space in question.space.values())
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=asked.startup_trials,
                multivariate=True,
                constant_liar=True,
                group=conditional,
            )
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=asked.startup_trials)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=asked.startup_trials)
        case "qmc":
            # One sequence for all workers and calls: how far it has come is stored with the study.
            return optuna.samplers.QMCSampler(seed=asked.seed, scramble=True)
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(question: SearchConfig) -> optuna.pruners.BasePruner:
    asked = question.pruner
    if isinstance(asked, Median):
        return optuna.pruners.MedianPruner(
            n_startup_trials=asked.startup_trials, n_warmup_steps=asked.warmup_epochs
        )
    if isinstance(asked, Halving) and asked.name == "hyperband":
        return optuna.pruners.HyperbandPruner(asked.min_epochs, question.epochs, asked.reduction)
    if isinstance(asked, Halving):
        return optuna.pruners.SuccessiveHalvingPruner(asked.min_epochs, asked.reduction)
    return optuna.pruners.NopPruner()
