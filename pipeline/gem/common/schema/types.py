"""The base of the models of params.yaml, and their bounded types."""

import os
import re
import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories; surrogates cannot be written to a file
_NAME_BYTES = 255


def _plain(text: str) -> str:
    if not text.strip() or any(unicodedata.category(character) in _CONTROL for character in text):
        raise ValueError("expected text, without control characters")
    return text


def _path(text: str) -> str:
    parts = Path(text).parts
    if any(part.startswith("~") or re.search(r"\$\{?[A-Za-z_]", part) for part in parts):
        raise ValueError(f"{text!r}: only a shell expands ~ and $NAME; write the whole path")
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in parts):
        raise ValueError(f"{text!r}: a name in it has more than {_NAME_BYTES} bytes")
    return text


def distinct(values: tuple) -> tuple:
    """ValueError if a value occurs twice."""
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"{value!r} appears twice; remove one")
    return values


def integer(low: int, high: int) -> type:
    return Annotated[int, Field(ge=low, le=high)]


def number(low: float, high: float) -> type:
    return Annotated[float, Field(ge=low, le=high)]


# Beyond the bounds of a number lies a typing error. `capacity` checks what values need together.
Share = number(0, 0.5)
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = integer(1, 10**6)
Weight = number(0, 1e6)
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[
    tuple[Seed, ...], Field(strict=False, min_length=1, max_length=1000), AfterValidator(distinct)
]
Text = Annotated[str, Field(max_length=500), AfterValidator(_plain)]
FilePath = Annotated[str, Field(max_length=1000), AfterValidator(_plain), AfterValidator(_path)]
FilePaths = Annotated[
    tuple[FilePath, ...], Field(strict=False, min_length=1), AfterValidator(distinct)
]
Names = Annotated[tuple[Text, ...], Field(strict=False), AfterValidator(distinct)]


class Frozen(BaseModel):
    """A model without unknown keys, type conversion or mutation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
