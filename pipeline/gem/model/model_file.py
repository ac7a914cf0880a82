"""The format of model.pt: tensors and plain values, and nothing believed that was not checked.

G genes. A file is read with `weights_only=True`; what it declares is checked before it is used, and costs no more memory
than the file itself.
"""

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from pipeline.gem.common.config import Covariate, Frozen, Model, Positive
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256_of

FORMAT_VERSION = 4


class _Record(Frozen):
    model_config = ConfigDict(arbitrary_types_allowed=True)


class FeaturesState(_Record):
    labels: list[str]
    values: Tensor


class FieldState(_Record):
    name: str
    covariate: Covariate
    levels: list[str]
    mean: float
    deviation: Positive
    features: FeaturesState | None


class ImpliedState(_Record):
    given: str
    told: str
    levels: dict[str, str]


class MetadataState(_Record):
    technical: list[FieldState]
    biological: list[FieldState]
    perturbation: list[FieldState]
    implied: list[ImpliedState]

    def fields(self) -> list[FieldState]:
        return [*self.technical, *self.biological, *self.perturbation]


class TargetsState(_Record):
    column: str | None
    genes: dict[str, Annotated[int, Field(ge=0)]]


class SeenState(_Record):
    columns: list[str]
    several: list[str]
    control: Annotated[list[str], Field(min_length=2, max_length=2)] | None
    combinations: list[list[str | None]]


class Contents(_Record):
    """Everything in a model file; its fields are the keys of the file."""

    format_version: int
    genes: Annotated[list[str], Field(min_length=1)]
    gene_list_sha256: str
    metadata: MetadataState
    targets: TargetsState
    model: Model
    hidden_study: str | None
    seen: SeenState
    temperatures: dict[str, Positive]
    weights: dict[str, Tensor]


def pack(described: Mapping[str, object]) -> bytes:
    """The bytes of a file; the same content gives the same bytes."""
    # Through a buffer: torch.save writes the name of the file it is given into the bytes.
    buffer = io.BytesIO()
    torch.save(_plain({"format_version": FORMAT_VERSION} | dict(described)), buffer)
    return buffer.getvalue()


def unpack(path: Path) -> tuple[Contents, dict]:
    """(what a file holds, the same as plain values). InputError where it is absent, IntegrityError where it is no GEM."""
    if not path.exists():
        raise InputError(f"{path}: absent; `dvc repro` trains it")
    try:
        _check_archive(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        RuntimeError,
        NotImplementedError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
    ) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise IntegrityError(
            f"{path}: not a GEM model file ({reason}); train the model again"
        ) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{path}: format version {version}, expected {FORMAT_VERSION}; train the model again"
        )
    _check_references(path, content)
    try:
        contents = Contents.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise IntegrityError(f"{path}: {key}: {problem['msg']}; train the model again") from None
    problems = [*_inconsistencies(contents)]
    if problems:
        raise IntegrityError(*(f"{path}: {problem}; train the model again" for problem in problems))
    return contents, content


def check_weights(
    path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """IntegrityError where weights are not, in name, type and shape, those of the network that the file describes, or not finite.

    `expected` need not hold any values: the difference is found before the network is made.
    """
    missing, surplus = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    problems = [
        f"{len(names)} {what} ({examples(names)})"
        for what, names in (("missing", missing), ("unknown", surplus))
        if names
    ]
    for name in sorted(set(expected) & set(weights)):
        if weights[name].layout == torch.strided and weights[name].shape != expected[name].shape:
            problems.append(
                f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
            )
        elif problem := _tensor_problem(weights[name], expected[name].dtype):
            problems.append(f"{name} {problem}")
    if problems:
        raise IntegrityError(
            f"{path}: its weights do not fit its configuration: {'; '.join(problems)}; train the model again"
        )


def _check_archive(path: Path) -> None:
    """IntegrityError where the archive is damaged (torch reads a flipped bit without complaint), or would grow when it is read."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(entry.file_size for entry in entries) > path.stat().st_size
        ):
            raise IntegrityError(
                f"{path}: holds compressed or overlapping parts, which no GEM model file does; train the model again"
            )
        damaged = archive.testzip()
    if damaged:
        raise IntegrityError(f"{path}: {damaged} inside it is damaged; train the model again")


def _check_references(path: Path, content: object) -> None:
    """IntegrityError where the content is larger than its file: a list that is named many times would grow when it is copied."""
    left, waiting = path.stat().st_size, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list, tuple)):
            left -= len(value)
            if left < 0:
                raise IntegrityError(
                    f"{path}: holds more values than bytes, which no GEM model file does; train the model again"
                )
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _inconsistencies(contents: Contents) -> list[str]:
    """What no file has that this code wrote, though every part is of the right type."""
    problems = []
    if len(set(contents.genes)) < len(contents.genes):
        problems.append("genes: a name stands twice")
    if sha256_of(contents.genes) != contents.gene_list_sha256:
        problems.append("gene_list_sha256: not that of the genes")
    beyond = [
        name for name, position in contents.targets.genes.items() if position >= len(contents.genes)
    ]
    if beyond:
        problems.append(
            f"targets: {examples(beyond)} hit genes that are none of the {len(contents.genes)}"
        )
    for field in contents.metadata.fields():
        if field.covariate.kind == "embedding" and field.features is None:
            problems.append(f"metadata: {field.name}: an embedding without features")
        if field.features is not None and (problem := _features_problem(field.features)):
            problems.append(f"metadata: {field.name}: features {problem}")
    names = {field.name for field in contents.metadata.fields()}
    strange = [one.told for one in contents.metadata.implied if not {one.given, one.told} <= names]
    if strange:
        problems.append(f"metadata: implied: {examples(strange)} by or of no covariate of it")
    width = len(contents.seen.columns)
    if any(len(combination) != width for combination in contents.seen.combinations):
        problems.append(f"seen: combinations of another length than {width}")
    return problems


def _features_problem(features: FeaturesState) -> str | None:
    values = features.values
    if values.layout == torch.strided and (values.ndim != 2 or len(values) != len(features.labels)):
        return f"have shape {tuple(values.shape)} for {len(features.labels)} labels"
    return _tensor_problem(values, torch.float32)


def _tensor_problem(value: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor is none that this code writes: dense, of its own memory, finite."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is no dense tensor"
    if value.dtype != dtype:
        return f"is {value.dtype}, expected {dtype}"
    if (
        not value.is_contiguous()
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()
    ):
        return "does not fill its memory"
    if not math.isfinite(value.abs().max()) if value.numel() else False:
        return "holds a number that is not finite"
    return None


def _plain(value: object) -> object:
    """Arrays as tensors, which torch loads with weights_only; equal texts as one object: pickle writes a second one by reference."""
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, str):
        return sys.intern(str(value))
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
