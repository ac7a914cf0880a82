"""A search as a question in a file: experiments/<study>.yaml, typed and validated like params.yaml."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.gem import yamlfile
from pipeline.gem.config import STUDY_NAME, Count, Frozen, Params, Seed, flatten, read_model
from pipeline.gem.errors import InputError, did_you_mean

FOLDER = Path("experiments")
SEARCHABLE = ("model", "train")
BETTER = {"predictive_log_likelihood": "maximize", "mse": "minimize"}


class IntegerSpace(Frozen):
    type: Literal["integer"]
    low: int
    high: int
    log: bool


class FloatSpace(Frozen):
    type: Literal["float"]
    low: float
    high: float
    log: bool


class Choice(Frozen):
    type: Literal["categorical"]
    choices: Annotated[tuple[str | int | float | bool | None, ...], Field(strict=False, min_length=2)]


Space = Annotated[IntegerSpace | FloatSpace | Choice, Field(discriminator="type")]


class Objective(Frozen):
    """A figure of the choice split, comparable across settings; the weighted loss is not on offer."""

    metric: Literal["predictive_log_likelihood", "mse"]
    direction: Literal["maximize", "minimize"]

    @model_validator(mode="after")
    def _fits(self):
        if self.direction != BETTER[self.metric]:
            raise ValueError(f"direction is {self.direction}, which would promote the worst model by {self.metric}; write {BETTER[self.metric]}")
        return self


class Sampler(Frozen):
    name: Literal["tpe", "random"]
    seed: Seed
    startup_trials: Count


class Pruner(Frozen):
    name: Literal["median", "none"]
    startup_trials: Annotated[int, Field(ge=0)]
    warmup_epochs: Annotated[int, Field(ge=0)]


class Question(Frozen):
    """What a search asks. `baseline` is trial 0 and what the winner is compared with."""

    question: str
    space: dict[str, Space]
    baseline: dict
    objective: Objective
    sampler: Sampler
    pruner: Pruner
    epochs: Count

    @field_validator("space")
    @classmethod
    def _asks_something(cls, space: dict) -> dict:
        if not space:
            raise ValueError("is empty; name one key of params.yaml at least")
        return space

    @property
    def baseline_values(self) -> dict[str, object]:
        return flatten(self.baseline)


def read_question(study: str, params: Params, folder: Path = FOLDER) -> Question:
    """experiments/<study>.yaml against params.yaml. InputError lists every problem at once."""
    if not re.fullmatch(STUDY_NAME, study):
        raise InputError(f"the study {study!r} is no name; expected letters, digits and underscores, for {folder}/<study>.yaml")
    path = folder / f"{study}.yaml"
    if not path.exists():
        known = sorted(found.stem for found in folder.glob("*.yaml"))
        raise InputError(f"{path}: no such study{did_you_mean(study, known)}")
    question = read_model(path, Question)
    document = yamlfile.read(path)
    searchable = params.flat(*SEARCHABLE)
    problems = []
    for name, space in question.space.items():
        where = document.where(("space", name))
        if name in params.flat() and name not in searchable:
            problems.append(f"{where}: {name} cannot be searched; only keys of {' and '.join(SEARCHABLE)} can")
        elif name not in searchable:
            problems.append(f"{where}: {name} is no key of params.yaml{did_you_mean(name, searchable)}")
        else:
            problems += [f"{where}: space.{name}: {problem}" for problem in _space_problems(name, space, question, params)]
    for name in sorted(set(question.baseline_values) ^ set(question.space)):
        where = document.where(("baseline",) if name in question.space else ("baseline", *name.split(".")))
        problems.append(f"{where}: {name} must stand in both space and baseline; add it to {'baseline' if name in question.space else 'space'}")
    if problems:
        raise InputError(*problems)
    return question


def _space_problems(name: str, space: Space, question: Question, params: Params) -> list[str]:
    """Whether the ends of a range and the baseline are values that params.yaml may hold."""
    baseline = question.baseline_values.get(name)
    if isinstance(space, Choice):
        candidates, inside = list(space.choices), baseline in space.choices
    else:
        if space.low >= space.high:
            return [f"low ({space.low}) must be below high ({space.high})"]
        if space.log and space.low <= 0:
            return [f"low is {space.low}; a log scale needs a positive one"]
        number = isinstance(baseline, (int, float)) and not isinstance(baseline, bool)
        candidates, inside = [space.low, space.high], number and space.low <= baseline <= space.high
    problems = [f"{value!r} is no value for params.yaml: {reason}" for value in candidates if (reason := _refusal(name, value, params))]
    if name not in question.baseline_values:
        return problems
    if not inside:
        return [f"the baseline {baseline!r} lies outside the space", *problems]
    # Inside by its size, but 16.0 is no integer.
    reason = _refusal(name, baseline, params)
    return [f"the baseline {baseline!r} is no value for params.yaml: {reason}", *problems] if reason else problems


def _refusal(name: str, value: object, params: Params) -> str | None:
    """Why params.yaml may not hold a value; None where it may."""
    try:
        params.override({name: value})
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None
