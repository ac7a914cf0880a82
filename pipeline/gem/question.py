"""A search as a question in a file: experiments/<study>.yaml, typed and validated like params.yaml."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from pipeline.gem import yamlfile
from pipeline.gem.config import Count, Frozen, Params, Seed, flatten, read_model
from pipeline.gem.errors import InputError, did_you_mean

FOLDER = Path("experiments")
SEARCHABLE = ("model", "train")


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

    @property
    def baseline_values(self) -> dict[str, object]:
        return flatten(self.baseline)


def read_question(study: str, params: Params, folder: Path = FOLDER) -> Question:
    """experiments/<study>.yaml against params.yaml. InputError lists every problem at once."""
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
        if name not in searchable:
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
    problems = [] if inside or baseline is None else [f"the baseline {baseline!r} lies outside the space"]
    for value in candidates:
        try:
            params.override({name: value})
        except ValidationError as error:
            problems.append(f"{value!r} is no value for params.yaml: {error.errors()[0]['msg']}")
    return problems
