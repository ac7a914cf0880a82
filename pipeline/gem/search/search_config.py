"""The definition of a search: experiments/searches/NAME.yaml, validated like params.yaml."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.gem.common import yaml_file
from pipeline.gem.common.capacity import Size, need_problems, training_needs
from pipeline.gem.common.config import SEARCH_NAME, Params, read_model
from pipeline.gem.common.config_errors import expectation, shown
from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.common.schema.types import Count, Frozen, Seed, Seeds, Text, integer, number
from pipeline.gem.common.yaml_file import flatten
from pipeline.gem.search.space import MAX_POINTS, CategoricalSpace, Space, range_problems

EXPERIMENTS = Path("experiments")  # the results of each search, in a folder of its name
SEARCHES = EXPERIMENTS / "searches"  # the definitions
SEARCHABLE_SECTIONS = ("model", "train")
# A search sets its own epochs and seeds. Threads and device do not belong to a model.
NOT_SEARCHABLE = ("train.epochs", "train.seeds", "train.threads", "train.device")
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "predictive_log_likelihood": "maximize",
    "evidence_lower_bound": "maximize",
    "reconstruction_log_likelihood": "maximize",
    "mse": "minimize",
    "latent_leakage": "minimize",
}
# Metrics that a fit reports after every epoch. Only these allow pruning.
EPOCH_METRICS = ("predictive_log_likelihood", "evidence_lower_bound", "mse")

Values = dict[str, object]  # a point of the space: dotted keys of params.yaml to values


class Objective(Frozen):
    """A metric of the selection split, comparable between settings. The training loss is not."""

    metric: Literal[tuple(DIRECTIONS)]
    direction: Literal["maximize", "minimize"]

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"

    @model_validator(mode="after")
    def _has_the_direction_of_its_metric(self):
        expected = DIRECTIONS[self.metric]
        if self.direction != expected:
            raise ValueError(
                f"direction is {self.direction}, which would promote the worst model by "
                f"{self.metric}; write {expected}"
            )
        return self


class FixedSampler(Frozen):
    """A sampler that ignores the values of earlier trials."""

    name: Literal["random", "grid", "qmc"]
    seed: Seed


class AdaptiveSampler(Frozen):
    """A sampler that learns from earlier trials, after the baseline and `startup_trials` that
    cover the space evenly (scrambled Sobol points)."""

    name: Literal["tpe", "gp", "cmaes"]
    seed: Seed
    startup_trials: Count


class MedianPruner(Frozen):
    name: Literal["median"]
    startup_trials: integer(0, 10**6)
    warmup_epochs: integer(0, 10**6)


class HalvingPruner(Frozen):
    """Successive halving. Rungs are at `min_epochs`, times `reduction`, times `reduction` again
    and so on; of the trials that reach a rung, one in `reduction` continues."""

    name: Literal["hyperband", "asha"]
    min_epochs: Count
    reduction: integer(2, 1000)


class NoPruner(Frozen):
    name: Literal["none"]


class ConfirmationConfig(Frozen):
    """The baseline and the `top` best trials are fitted again with fresh seeds."""

    top: Count
    seeds: Seeds
    epochs: Count | None = None  # None: train.epochs


def _as_tuple(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else (value,)


class SearchConfig(Frozen):
    """A search. `baseline` is trial 0, and the winner is compared with it."""

    description: Text
    space: Annotated[dict[Text, Space], Field(min_length=1, max_length=100)]
    baseline: dict
    objective: Annotated[
        tuple[Objective, ...], BeforeValidator(_as_tuple), Field(strict=False, min_length=1)
    ]
    sampler: Annotated[FixedSampler | AdaptiveSampler, Field(discriminator="name")]
    pruner: Annotated[MedianPruner | HalvingPruner | NoPruner, Field(discriminator="name")]
    epochs: Count
    seeds: Seeds
    trials: Count | None = None  # None: tune.trials of params.yaml
    time_limit: number(0.01, 1e6) | None = None  # minutes of one call, after which no trial starts
    confirm: ConfirmationConfig

    @property
    def primary(self) -> Objective:
        """The objective that chooses the winner, among the Pareto-optimal trials."""
        return self.objective[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(objective.metric for objective in self.objective)

    @property
    def baseline_values(self) -> Values:
        return flatten(self.baseline)

    @property
    def largest_values(self) -> Values:
        """The corner of the space with the largest networks, batches and rates."""
        return {name: space.high for name, space in self.space.items()}

    @property
    def fingerprint_fields(self) -> dict:
        """The fields that decide which trials are comparable. Budgets, the description and the
        confirmation may change during a search."""
        return self.model_dump(
            mode="json", exclude={"description", "trials", "time_limit", "confirm"}
        )

    def is_active(self, name: str, values: Mapping[str, object]) -> bool:
        """Whether a key is searched, given the values of the keys before it."""
        when = self.space[name].when or {}
        return all(key in values and values[key] in allowed for key, allowed in when.items())

    def points(self) -> list[Values] | None:
        """Every point of the space in order, or None if there are more than MAX_POINTS."""
        points: list[Values] = [{}]
        for name, space in self.space.items():
            values = space.values()
            if values is None or len(points) * len(values) > MAX_POINTS:
                return None
            active = [point for point in points if self.is_active(name, point)]
            inactive = [point for point in points if not self.is_active(name, point)]
            points = [point | {name: value} for point in active for value in values] + inactive
        return points


def search_files(folder: Path = SEARCHES) -> list[Path]:
    """The definitions of searches, sorted. What file managers and editors leave is hidden (._NAME,
    .#NAME) or has another ending, and is none."""
    return sorted(
        path
        for path in folder.glob("*")
        if path.suffix in (".yaml", ".yml") and not path.name.startswith(".")
    )


def misnamed(path: Path) -> str | None:
    """Why no search can be run by the name of this file, or None."""
    if path.suffix == ".yaml" and re.fullmatch(SEARCH_NAME, path.stem):
        return None
    return (
        f"{path}: a search has a name of letters, digits and underscores, and the ending .yaml; "
        "rename the file, or remove it"
    )


def read_search_config(name: str, params: Params, folder: Path = SEARCHES) -> SearchConfig:
    """Reads FOLDER/NAME.yaml and checks it against params.yaml.

    Raises:
        InputError: lists every problem, with file, line and dotted key.
    """
    if not re.fullmatch(SEARCH_NAME, name):
        raise InputError(f"--search {name!r} is not a name of letters, digits and _")
    path = folder / f"{name}.yaml"
    if not path.exists():
        names = [file.stem for file in search_files(folder)]
        raise InputError(f"{path}: no such search{did_you_mean(name, names)}")
    config = read_model(path, SearchConfig)
    document = yaml_file.read(path)
    problems = [
        f"{document.where(key)}: {problem}"
        for key, problem in (*_key_problems(config, params), *_baseline_problems(config))
    ]
    for check in (_repetition_problems, _pruner_problems, _sampler_problems):
        for key, problem in check(config):
            problems.append(f"{document.where((key,))}: {key}: {problem}")
    if not problems and (reason := _params_error(config.largest_values, params)):
        problems.append(f"{document.where(('space',))}: space: its largest values: {reason}")
    if problems:
        raise InputError(*problems)
    return config


def size_problems(
    name: str, config: SearchConfig, params: Params, cohort: Size, folder: Path = SEARCHES
) -> list[str]:
    """What the largest trial of the space, and all trials, need beyond this machine."""
    trials = config.trials or params.tune.trials
    fixed = {"train.epochs": config.epochs, "train.seeds": config.seeds, "tune.trials": trials}
    values = params.override(config.largest_values).flat() | fixed
    document, places = yaml_file.read(folder / f"{name}.yaml"), {"train.epochs": ("epochs",)}
    places |= {"train.seeds": ("seeds",), "tune.trials": ("trials",)}
    return [
        f"{document.where(places.get(key, ('space', key)))}: {problem}"
        for key, problem in need_problems(training_needs(cohort, search=True), values)
    ]


def _key_problems(config: SearchConfig, params: Params) -> Iterator[tuple[yaml_file.Key, str]]:
    """Keys of the space that params.yaml does not have, and values that it does not allow."""
    searchable = params.flat(*SEARCHABLE_SECTIONS)
    for name, space in config.space.items():
        key = ("space", name)
        if name in NOT_SEARCHABLE:
            yield key, f"{name} cannot be searched; a search has its own epochs and seeds"
        elif name in searchable:
            for problem in _space_problems(name, space, config, params):
                yield key, f"space.{name}: {problem}"
        elif name in params.flat():
            sections = " and ".join(SEARCHABLE_SECTIONS)
            yield key, f"{name} cannot be searched; only keys of {sections} can"
        else:
            yield key, f"{name} is not a key of params.yaml{did_you_mean(name, searchable)}"


def _baseline_problems(config: SearchConfig) -> Iterator[tuple[yaml_file.Key, str]]:
    message = "{} must be in both space and baseline; add it to {}"
    for name in sorted(set(config.space) - set(config.baseline_values)):
        yield ("baseline",), message.format(name, "baseline")
    for name in sorted(set(config.baseline_values) - set(config.space)):
        yield ("baseline", *name.split(".")), message.format(name, "space")


def _space_problems(name: str, space: Space, config: SearchConfig, params: Params) -> list[str]:
    """Problems of a range and its condition, then values that params.yaml does not allow."""
    problems = range_problems(space) + _when_problems(name, space, config)
    if problems:
        return problems
    bounds = space.choices if isinstance(space, CategoricalSpace) else (space.low, space.high)
    for value in bounds:
        if reason := _params_error({name: value}, params):
            problems.append(f"{shown(value)} is not allowed by params.yaml: {reason}")
    if name not in config.baseline_values:
        return problems
    baseline = config.baseline_values[name]
    if baseline not in space:
        return [f"the baseline {shown(baseline)} is outside the space", *problems]
    # 16.0 is inside an integer range, but params.yaml does not allow it.
    if reason := _params_error({name: baseline}, params):
        reason = f"the baseline {shown(baseline)} is not allowed by params.yaml: {reason}"
        return [reason, *problems]
    return problems


def _when_problems(name: str, space: Space, config: SearchConfig) -> list[str]:
    """Conditions on keys that do not come before, or on values that those never have."""
    problems = []
    names = list(config.space)
    before = names[: names.index(name)]
    for other, allowed in (space.when or {}).items():
        if other not in before:
            suggestion = did_you_mean(other, before)
            problems.append(f"when: {other} does not come before it in the space{suggestion}")
            continue
        for value in allowed:
            if value not in config.space[other]:
                problems.append(f"when: {other} is never {shown(value)}; remove it")
    return problems


def _params_error(values: Values, params: Params) -> str | None:
    """Why params.yaml does not allow these values, or None."""
    try:
        params.override(values)
    except ValidationError as error:
        return expectation(error.errors()[0])
    return None


def _repetition_problems(config: SearchConfig) -> Iterator[tuple[str, str]]:
    metrics = config.metrics
    for metric in sorted({metric for metric in metrics if metrics.count(metric) > 1}):
        yield "objective", f"{metric} appears twice; remove one"
    for seed in sorted(set(config.confirm.seeds) & set(config.seeds)):
        yield "confirm", f"{seed} is a seed of the trials, which selected the best; use a fresh one"


def _pruner_problems(config: SearchConfig) -> Iterator[tuple[str, str]]:
    pruner, metrics = config.pruner, config.metrics
    if isinstance(pruner, NoPruner):
        return
    if len(metrics) > 1:
        problem = f"{pruner.name} needs a single objective, but there are {len(metrics)}"
        yield "pruner", f"{problem}; write {{name: none}}"
    elif metrics[0] not in EPOCH_METRICS:
        problem = f"{metrics[0]} is computed only at the end of a trial"
        choices = " or ".join(EPOCH_METRICS)
        yield "pruner", f"{problem}; write {{name: none}}, or choose {choices}"
    if isinstance(pruner, HalvingPruner) and pruner.min_epochs >= config.epochs:
        yield "pruner", f"min_epochs ({pruner.min_epochs}) must be below epochs ({config.epochs})"


def _sampler_problems(config: SearchConfig) -> Iterator[tuple[str, str]]:
    spaces, metrics = config.space.items(), config.metrics
    if config.sampler.name == "cmaes":
        if len(metrics) > 1:
            problem = f"cmaes needs a single objective, but there are {len(metrics)}"
            yield "sampler", f"{problem}; use tpe, gp, random or qmc"
        if conditional := [name for name, space in spaces if space.when]:
            yield "sampler", f"cmaes does not allow a condition, as {conditional[0]} has; use tpe"
        numeric = sum(not isinstance(space, CategoricalSpace) for _, space in spaces)
        if numeric < 2:
            problem = f"cmaes needs two numeric keys, but the space has {numeric}"
            yield "sampler", f"{problem}; use tpe or random"
    if config.sampler.name == "grid":
        if infinite := [name for name, space in spaces if space.values() is None]:
            problem = f"grid needs steps, but {', '.join(infinite)} has none"
            yield "sampler", f"{problem}; add step (and log: false), or use qmc"
        elif config.points() is None:
            problem = f"the grid has more than {MAX_POINTS:,} points"
            yield "sampler", f"{problem}; use larger steps, or qmc"
