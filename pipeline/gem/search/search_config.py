"""A search as a question in a file: experiments/<study>.yaml, typed and validated like params.yaml."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import (
    SEARCH_NAME,
    Count,
    Frozen,
    Params,
    Positive,
    Seed,
    flatten,
    read_model,
)
from pipeline.gem.common.errors import InputError, did_you_mean

EXPERIMENTS = Path("experiments")  # results of searches, a folder each
SEARCHES = EXPERIMENTS / "searches"  # their definitions
SEARCHABLE = ("model", "train")
OWN_TO_A_FIT = (
    "train.epochs",
    "train.seeds",
    "train.threads",
    "train.device",
)  # a study has epochs and seeds of its own
ENUMERABLE = 100_000  # points; a larger space counts as endless
BETTER: dict[str, Literal["maximize", "minimize"]] = {
    "predictive_log_likelihood": "maximize",
    "evidence_lower_bound": "maximize",
    "reconstruction_log_likelihood": "maximize",
    "mse": "minimize",
    "leakage": "minimize",
}
BY_EPOCH = (
    "predictive_log_likelihood",
    "evidence_lower_bound",
    "mse",
)  # known after every epoch: what pruning can look at

Scalar = str | int | float | bool | None
Condition = dict[str, Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]]


class _Range(Frozen):
    log: bool
    when: Condition | None = (
        None  # searched only where other keys of the space have one of these values
    )

    def numbers(self) -> tuple | None:
        """Every value in order; None where there is no end of them."""
        step = self.step or (1 if isinstance(self, IntegerSpace) else None)
        if step is None or (self.high - self.low) / step >= ENUMERABLE:
            return None
        return tuple(
            self.low + index * step for index in range(round((self.high - self.low) / step) + 1)
        )


class IntegerSpace(_Range):
    type: Literal["integer"]
    low: int
    high: int
    step: Count | None = None


class FloatSpace(_Range):
    type: Literal["float"]
    low: float
    high: float
    step: Positive | None = None


class Choice(Frozen):
    type: Literal["categorical"]
    choices: Annotated[tuple[Scalar, ...], Field(strict=False, min_length=2)]
    when: Condition | None = None

    def numbers(self) -> tuple:
        return self.choices


Space = Annotated[IntegerSpace | FloatSpace | Choice, Field(discriminator="type")]


class Objective(Frozen):
    """A figure of the choice split, comparable across settings; the weighted loss is not on offer."""

    metric: Literal[tuple(BETTER)]
    direction: Literal["maximize", "minimize"]

    @model_validator(mode="after")
    def _fits(self):
        if self.direction != BETTER[self.metric]:
            raise ValueError(
                f"direction is {self.direction}, which would promote the worst model by {self.metric}; write {BETTER[self.metric]}"
            )
        return self


Several = Annotated[tuple[Objective, ...], Field(strict=False)]


class Seeded(Frozen):
    name: Literal["random", "grid", "qmc"]
    seed: Seed


class Started(Frozen):
    name: Literal["tpe", "gp", "cmaes"]
    seed: Seed
    startup_trials: Count


class Median(Frozen):
    name: Literal["median"]
    startup_trials: Annotated[int, Field(ge=0)]
    warmup_epochs: Annotated[int, Field(ge=0)]


class Halving(Frozen):
    """Successive halving: of the trials that reach `min_epochs`, times `reduction`, times `reduction` ..., one in `reduction` goes on."""

    name: Literal["hyperband", "asha"]
    min_epochs: Count
    reduction: Annotated[int, Field(ge=2)]


class NoPruner(Frozen):
    name: Literal["none"]


class Confirm(Frozen):
    """Who is tried again with fresh seeds before a winner is named: the best trials, and the baseline."""

    top: Count
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    epochs: Count | None = None  # None: train.epochs
    from_trials: Annotated[int, Field(ge=0)] = (
        0  # a smaller search is a look around: its best trial once more, with one seed, half as long as a trial
    )


class SearchConfig(Frozen):
    """What a search asks. `baseline` is trial 0 and what the winner is compared with."""

    question: str
    space: dict[str, Space]
    baseline: dict
    objective: Annotated[
        Annotated[Objective, Tag("one")] | Annotated[Several, Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, (list, tuple)) else "one"),
    ]
    sampler: Annotated[Seeded | Started, Field(discriminator="name")]
    pruner: Annotated[Median | Halving | NoPruner, Field(discriminator="name")]
    epochs: Count
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    trials: Count | None = None  # None: tune.trials of params.yaml
    time_limit: Positive | None = None  # minutes of one call, after which no trial starts
    confirm: Confirm

    def confirmation(self, trials: int) -> Confirm:
        """How a search of so many trials is confirmed."""
        if trials >= self.confirm.from_trials:
            return self.confirm
        return Confirm(top=1, seeds=self.confirm.seeds[:1], epochs=-(-self.epochs // 2))

    @field_validator("space")
    @classmethod
    def _asks_something(cls, space: dict) -> dict:
        if not space:
            raise ValueError("is empty; name one key of params.yaml at least")
        return space

    @field_validator("objective")
    @classmethod
    def _seeks_something(cls, objective: Objective | tuple) -> Objective | tuple:
        if objective == ():
            raise ValueError("is empty; name one metric at least")
        return objective

    @property
    def baseline_values(self) -> dict[str, object]:
        return flatten(self.baseline)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The first one chooses the winner; with several, among the trials that none beats in all."""
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    @property
    def decisive(self) -> dict:
        """What makes it this question: budgets, wording and confirmations may change and the trials stay valid."""
        return self.model_dump(mode="json", exclude={"question", "trials", "time_limit", "confirm"})

    def is_asked(self, name: str, values: Mapping[str, object]) -> bool:
        """Whether a key is searched, given the values of those that stand before it."""
        condition = self.space[name].when or {}
        return all(
            other in values and values[other] in allowed for other, allowed in condition.items()
        )

    def points(self) -> list[dict[str, object]] | None:
        """Every point of the space in order; None where there are more than ENUMERABLE."""
        found: list[dict[str, object]] = [{}]
        for name, space in self.space.items():
            numbers = space.numbers()
            if numbers is None or len(found) * len(numbers) > ENUMERABLE:
                return None
            found = [
                point | {name: value}
                for point in found
                for value in numbers
                if self.is_asked(name, point)
            ] + [point for point in found if not self.is_asked(name, point)]
        return found


def read_search_config(study: str, params: Params, folder: Path = SEARCHES) -> SearchConfig:
    """experiments/<study>.yaml against params.yaml. InputError lists every problem at once."""
    if not re.fullmatch(SEARCH_NAME, study):
        raise InputError(
            f"the study {study!r} is no name; expected letters, digits and underscores, for {folder}/<study>.yaml"
        )
    path = folder / f"{study}.yaml"
    if not path.exists():
        known = sorted(found.stem for found in folder.glob("*.yaml"))
        raise InputError(f"{path}: no such study{did_you_mean(study, known)}")
    question = read_model(path, SearchConfig)
    document = yaml_file.read(path)
    searchable = params.flat(*SEARCHABLE)
    problems = []
    for name, space in question.space.items():
        where = document.where(("space", name))
        if name in params.flat() and name not in searchable:
            problems.append(
                f"{where}: {name} cannot be searched; only keys of {' and '.join(SEARCHABLE)} can"
            )
        elif name in OWN_TO_A_FIT:
            problems.append(
                f"{where}: {name} cannot be searched; a study says epochs and seeds itself"
            )
        elif name not in searchable:
            problems.append(
                f"{where}: {name} is no key of params.yaml{did_you_mean(name, searchable)}"
            )
        else:
            problems += [
                f"{where}: space.{name}: {problem}"
                for problem in _space_problems(name, space, question, params)
            ]
    for name in sorted(set(question.baseline_values) ^ set(question.space)):
        where = document.where(
            ("baseline",) if name in question.space else ("baseline", *name.split("."))
        )
        problems.append(
            f"{where}: {name} must stand in both space and baseline; add it to {'baseline' if name in question.space else 'space'}"
        )
    problems += [
        f"{document.where(tuple(key.split('.')))}: {key}: {problem}"
        for key, problem in _plan_problems(question)
    ]
    if problems:
        raise InputError(*problems)
    return question


def _space_problems(name: str, space: Space, question: SearchConfig, params: Params) -> list[str]:
    """Whether the ends of a range and the baseline are values that params.yaml may hold."""
    baseline = question.baseline_values.get(name)
    problems = _range_problems(space) + _condition_problems(name, space, question)
    if problems:
        return problems
    if isinstance(space, Choice):
        candidates, inside = list(space.choices), baseline in space.choices
    else:
        candidates, inside = [space.low, space.high], _lies_inside(baseline, space)
    problems = [
        f"{value!r} is no value for params.yaml: {reason}"
        for value in candidates
        if (reason := _refusal(name, value, params))
    ]
    if name not in question.baseline_values:
        return problems
    if not inside:
        return [f"the baseline {baseline!r} lies outside the space", *problems]
    # Inside by its size, but 16.0 is no integer.
    reason = _refusal(name, baseline, params)
    return (
        [f"the baseline {baseline!r} is no value for params.yaml: {reason}", *problems]
        if reason
        else problems
    )


def _range_problems(space: Space) -> list[str]:
    if isinstance(space, Choice):
        return []
    if space.low >= space.high:
        return [f"low ({space.low}) must be below high ({space.high})"]
    if space.log and space.low <= 0:
        return [f"low is {space.low}; a log scale needs a positive one"]
    if space.step and space.log:
        return ["a log scale has no steps; remove step, or write log: false"]
    if space.step and not _is_whole((space.high - space.low) / space.step):
        return [
            f"from {space.low} in steps of {space.step} one does not come to {space.high}; change high or step"
        ]
    return []


def _condition_problems(name: str, space: Space, question: SearchConfig) -> list[str]:
    problems, before = [], list(question.space)[: list(question.space).index(name)]
    for other, allowed in (space.when or {}).items():
        if other not in before:
            problems.append(
                f"when: {other} does not stand before it in the space{did_you_mean(other, before)}"
            )
            continue
        numbers = question.space[other].numbers()
        strange = [
            value
            for value in allowed
            if (value not in numbers if numbers else not _lies_inside(value, question.space[other]))
        ]
        problems += [f"when: {other} is never {value!r}; remove it" for value in strange]
    return problems


def _lies_inside(value: object, space: IntegerSpace | FloatSpace) -> bool:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not space.low <= value <= space.high
    ):
        return False
    return not space.step or _is_whole((value - space.low) / space.step)


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9


def _plan_problems(question: SearchConfig) -> Iterator[tuple[str, str]]:
    """(key, problem) of what Optuna cannot do, or would do without saying that it makes no sense."""
    metrics, sampler, pruner = (
        [objective.metric for objective in question.objectives],
        question.sampler.name,
        question.pruner,
    )
    ranges = [space for space in question.space.values() if not isinstance(space, Choice)]
    conditional = [name for name, space in question.space.items() if space.when]
    if len(set(metrics)) < len(metrics):
        yield "objective", "a metric stands twice; remove one"
    if not isinstance(pruner, NoPruner):
        if len(metrics) > 1:
            yield (
                "pruner",
                f"{pruner.name} compares one number an epoch, and there are {len(metrics)} objectives; write {{name: none}}",
            )
        elif metrics[0] not in BY_EPOCH:
            yield (
                "pruner",
                f"{metrics[0]} is known at the end of a trial only; write {{name: none}}, or judge by {' or '.join(BY_EPOCH)}",
            )
    if isinstance(pruner, Halving) and pruner.min_epochs >= question.epochs:
        yield "pruner", f"min_epochs ({pruner.min_epochs}) must be below epochs ({question.epochs})"
    if sampler == "cmaes":
        if len(metrics) > 1:
            yield (
                "sampler",
                f"cmaes seeks one objective, and there are {len(metrics)}; use tpe, gp, random or qmc",
            )
        if conditional:
            yield (
                "sampler",
                f"cmaes cannot leave a key out, and {conditional[0]} has a condition; use tpe, or remove `when`",
            )
        if len(ranges) < 2:
            yield (
                "sampler",
                f"cmaes needs two numeric keys, and the space has {len(ranges)}; use tpe or random",
            )
    if sampler == "grid":
        endless = [name for name, space in question.space.items() if space.numbers() is None]
        if endless:
            yield (
                "sampler",
                f"grid needs steps: {', '.join(endless)} has none; add step (and log: false), or use qmc",
            )
        elif question.points() is None:
            yield (
                "sampler",
                f"the grid has more than {ENUMERABLE:,} points; make the steps wider, or use qmc",
            )
    for key, seeds in (("seeds", question.seeds), ("confirm", question.confirm.seeds)):
        if len(set(seeds)) < len(seeds):
            yield key, "a seed stands twice; remove one"
    used = sorted(set(question.seeds) & set(question.confirm.seeds))
    if used:
        yield (
            "confirm",
            f"seeds: {used[0]} is a seed of the trials, on which the best were chosen; take fresh ones",
        )


def _refusal(name: str, value: object, params: Params) -> str | None:
    """Why params.yaml may not hold a value; None where it may."""
    try:
        params.override({name: value})
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None
