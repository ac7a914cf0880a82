"""The format of model.safetensors: tensors, and their description as JSON in the header.

Files are validated before use. A damaged or hostile file is refused in one line; it runs no code,
and no network is allocated that its tensors do not fill.

G genes, U labels with features, E features.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Covariate, Frozen, Model, Positive
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256_of
from pipeline.gem.data.covariates import CovariateEncoder, FunctionalDependency
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.model.training_support import TrainingSupport

MODEL_FILE = "model.safetensors"  # of a model directory
FORMAT_VERSION = 5
MAX_DESCRIPTION_BYTES = 2**25
_KEY = "gem"  # of the description among the header's metadata
_WEIGHTS, _FEATURES = "network.", "features."  # prefixes of tensor names


class CovariateState(Frozen):
    name: str
    covariate: Covariate
    levels: tuple[str, ...]
    mean: float
    deviation: Positive
    feature_labels: tuple[str, ...] | None  # their values are the tensor features.<name> (U, E)

    @classmethod
    def from_encoder(cls, encoder: CovariateEncoder) -> "CovariateState":
        names = ("name", "covariate", "levels", "mean", "deviation")
        labels = encoder.features and encoder.features.labels
        return cls(**{name: getattr(encoder, name) for name in names}, feature_labels=labels)

    def to_encoder(self, tensors: Mapping[str, Tensor]) -> CovariateEncoder:
        features = None
        if self.feature_labels is not None:
            values = tensors[_FEATURES + self.name].numpy()
            features = FeatureTable(self.feature_labels, values)
        learned = self.levels, self.mean, self.deviation
        return CovariateEncoder(self.name, self.covariate, *learned, features)


class MetadataState(Frozen):
    technical: tuple[CovariateState, ...]
    biological: tuple[CovariateState, ...]
    perturbation: tuple[CovariateState, ...]
    dependencies: tuple[FunctionalDependency, ...]

    @classmethod
    def from_encoder(cls, encoder: MetadataEncoder) -> "MetadataState":
        groups = {
            group: tuple(CovariateState.from_encoder(field) for field in encoder.groups[group])
            for group in GROUPS
        }
        return cls(**groups, dependencies=tuple(encoder.dependencies))

    def to_encoder(self, tensors: Mapping[str, Tensor]) -> MetadataEncoder:
        groups = {
            group: [state.to_encoder(tensors) for state in getattr(self, group)] for group in GROUPS
        }
        return MetadataEncoder(groups, list(self.dependencies))

    def covariates(self) -> list[CovariateState]:
        return [state for group in GROUPS for state in getattr(self, group)]


class ModelDescription(Frozen):
    """A trained model without its tensors; its fields are the keys of the JSON."""

    format_version: Literal[5] = FORMAT_VERSION
    sha256: str = ""  # of the other keys and the tensors
    genes: Annotated[tuple[str, ...], Field(min_length=1)]
    gene_list_sha256: str
    metadata: MetadataState
    targets: TargetGenes
    model: Model
    hidden_study: str | None
    training_support: TrainingSupport
    temperatures: dict[str, Positive]


def pack(description: ModelDescription, tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a model file; the same for the same model. InputError if the description is
    larger than MAX_DESCRIPTION_BYTES."""
    checksum = _checksum(description.model_dump_json(), tensors)
    text = description.model_copy(update={"sha256": checksum}).model_dump_json()
    if len(text.encode()) > MAX_DESCRIPTION_BYTES:
        raise InputError(
            f"the model's genes and metadata levels take {len(text.encode()):,} bytes, more than "
            f"{MAX_DESCRIPTION_BYTES:,}; declare fewer covariates with many levels"
        )
    return save(dict(tensors), {_KEY: text})


def unpack(path: Path) -> tuple[ModelDescription, dict[str, Tensor]]:
    """The description and the tensors of a model file. InputError if the file is absent,
    IntegrityError if it is damaged or no model file."""
    if not path.exists():
        raise InputError(f"{path}: absent; `dvc repro` trains it")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise refusal(path, f"not a GEM model file ({error})") from None
    if not text:
        raise refusal(path, f"not a GEM model file (no {_KEY!r} in its metadata)")
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise refusal(path, f"its description has more than {MAX_DESCRIPTION_BYTES:,} bytes")
    try:
        description = ModelDescription.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        raise refusal(path, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    problems = [*_tensor_problems(tensors), *_inconsistencies(description, tensors)]
    if problems:
        raise refusal(path, *problems)
    if _checksum(text.replace(description.sha256, "", 1), tensors) != description.sha256:
        raise refusal(path, "damaged: its content does not match its checksum")
    return description, tensors


def refusal(path: Path, *problems: str) -> IntegrityError:
    """The error for a file with these problems: one printable line for each."""
    lines = ("".join(c if c.isprintable() else "?" for c in problem[:500]) for problem in problems)
    return IntegrityError(*(f"{path}: {line}; train the model again" for line in lines))


def named_tensors(weights: Mapping[str, Tensor], encoder: MetadataEncoder) -> dict[str, Tensor]:
    """Weights of the network and features of the covariates, by their names in the file."""
    features = {
        _FEATURES + field.name: torch.from_numpy(field.features.values)
        for field in encoder.fields
        if field.features
    }
    weights = {_WEIGHTS + name: weight.detach().cpu() for name, weight in weights.items()}
    return {name: tensor.contiguous() for name, tensor in (weights | features).items()}


def network_weights(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights among the tensors of a file. IntegrityError if their names or shapes differ from
    `expected`, whose tensors may lie on the meta device."""
    weights = {
        name.removeprefix(_WEIGHTS): tensor
        for name, tensor in tensors.items()
        if name.startswith(_WEIGHTS)
    }
    missing, unknown = sorted(expected.keys() - weights), sorted(weights.keys() - expected)
    problems = [f"{len(missing)} missing ({examples(missing)})"] if missing else []
    problems += [f"{len(unknown)} unknown ({examples(unknown)})"] if unknown else []
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights)
        if weights[name].shape != expected[name].shape
    ]
    if problems:
        raise refusal(path, f"weights do not fit the configuration: {'; '.join(problems)}")
    return weights


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a description without checksum, and of the names and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        if not name.startswith((_WEIGHTS, _FEATURES)):
            problems.append(f"unknown tensor {name}")
        elif tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype}, expected torch.float32")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    return problems


def _inconsistencies(description: ModelDescription, tensors: Mapping[str, Tensor]) -> list[str]:
    """Contradictions between parts that are valid one by one."""
    genes, problems = description.genes, []
    if len(set(genes)) < len(genes):
        problems.append("genes: a name occurs twice")
    if sha256_of(genes) != description.gene_list_sha256:
        problems.append("gene_list_sha256: not the hash of the genes")
    targets = description.targets.genes
    if outside := [name for name, gene in targets.items() if not 0 <= gene < len(genes)]:
        problems.append(f"targets: {examples(outside)} target none of the {len(genes)} genes")
    covariates = description.metadata.covariates()
    problems += [f"metadata: {text}" for text in _feature_problems(covariates, tensors)]
    names = {covariate.name for covariate in covariates}
    for dependency in description.metadata.dependencies:
        if not {dependency.determinant, dependency.determined} <= names:
            problems.append(
                "metadata: a dependency between unknown covariates "
                f"{dependency.determinant} and {dependency.determined}"
            )
    support = description.training_support
    if any(len(combination) != len(support.columns) for combination in support.combinations):
        problems.append(f"training_support: combinations not of {len(support.columns)} values")
    return problems


def _feature_problems(covariates: list[CovariateState], tensors: Mapping[str, Tensor]) -> list[str]:
    problems, expected = [], set()
    for covariate in covariates:
        if covariate.feature_labels is None:
            if covariate.covariate.kind == "embedding":
                problems.append(f"{covariate.name}: an embedding without features")
            continue
        name = _FEATURES + covariate.name
        expected.add(name)
        if name not in tensors:
            problems.append(f"{covariate.name}: no tensor {name}")
        elif tensors[name].ndim != 2 or len(tensors[name]) != len(covariate.feature_labels):
            shape, labels = tuple(tensors[name].shape), len(covariate.feature_labels)
            problems.append(f"{covariate.name}: features of shape {shape} for {labels} labels")
    unknown = {name for name in tensors if name.startswith(_FEATURES)} - expected
    return problems + ([f"unknown features {examples(sorted(unknown))}"] if unknown else [])
