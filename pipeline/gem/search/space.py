"""The space of a search: the range or the choices of each key."""

import math
from types import NoneType
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.gem.common.schema.types import Count, Frozen, distinct, integer, number

MAX_POINTS = 100_000  # of an enumerable space; a larger one counts as infinite
LARGEST_RATIO = 1e12  # of a log scale: beyond, most trials have values that mean zero


def _scalar(value: object) -> object:
    if not isinstance(value, (str, int, float, bool, NoneType)) or value in (math.inf, -math.inf):
        raise ValueError("expected text, a finite number, true, false or null")
    return value


Scalar = Annotated[object, AfterValidator(_scalar)]
# Other keys of the space, and the values of each for which a key is searched.
When = Annotated[
    dict[str, Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]],
    Field(min_length=1),
]


class _Range(Frozen):
    log: bool
    when: When | None = None

    def values(self) -> tuple | None:
        """Every value in ascending order, or None for an infinite range."""
        if self.step is None or (self.high - self.low) / self.step >= MAX_POINTS:
            return None
        steps = round((self.high - self.low) / self.step)
        return tuple(self.low + index * self.step for index in range(steps + 1))

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        inside = self.low <= value <= self.high
        return inside and (self.step is None or _is_whole((value - self.low) / self.step))


class IntegerSpace(_Range):
    type: Literal["integer"]
    low: integer(-(10**9), 10**9)
    high: integer(-(10**9), 10**9)
    step: Count = 1


class FloatSpace(_Range):
    type: Literal["float"]
    low: number(-1e9, 1e9)
    high: number(-1e9, 1e9)
    step: number(1e-9, 1e9) | None = None


class CategoricalSpace(Frozen):
    type: Literal["categorical"]
    choices: Annotated[
        tuple[Scalar, ...],
        Field(strict=False, min_length=2, max_length=1000),
        AfterValidator(distinct),
    ]
    when: When | None = None

    def values(self) -> tuple:
        return self.choices

    @property
    def high(self) -> Scalar:
        """The largest number, or the first of other choices."""
        numbers = [value for value in self.choices if type(value) in (int, float)]
        return max(numbers, default=self.choices[0])

    def __contains__(self, value: object) -> bool:
        return value in self.choices


Space = Annotated[IntegerSpace | FloatSpace | CategoricalSpace, Field(discriminator="type")]


def range_problems(space: Space) -> list[str]:
    if isinstance(space, CategoricalSpace):
        return []
    if space.low >= space.high:
        return [f"low ({space.low}) must be below high ({space.high})"]
    if space.log and space.low <= 0:
        return [f"low is {space.low}; a log scale needs a positive value"]
    if space.log and space.high / space.low > LARGEST_RATIO:
        return [f"high is more than {LARGEST_RATIO:g} times low; narrow the log scale"]
    if space.log and "step" in space.model_fields_set:
        return ["a log scale has no steps; remove step, or write log: false"]
    if space.step and not _is_whole((space.high - space.low) / space.step):
        return [f"steps of {space.step} from {space.low} do not reach {space.high}"]
    return []


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9
