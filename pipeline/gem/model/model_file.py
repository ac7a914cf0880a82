"""The content of model.safetensors: the tensors of a model, and its description as JSON.

A file is validated before use: no network is allocated that its tensors do not fill. Tensors are
named by the position of what they belong to, as any text may name a covariate.

U labels with features, E features.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Covariate, Frozen, Model, Numeric, Seed
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256_of
from pipeline.gem.data.covariates import CovariateEncoder, FunctionalDependency
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.data.units import DIMENSIONLESS, UNITS
from pipeline.gem.model import tensor_file
from pipeline.gem.model.calibration import TEMPERATURE_RANGE
from pipeline.gem.model.mixed.mixed_model import MIXED_TENSORS, MixedModel, Variances
from pipeline.gem.model.mixed.terms import Design
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.model.training_support import TrainingSupport

MODEL_FILE = "model.safetensors"  # of a model directory
FORMAT_VERSION = 11
_BLOCK_TENSORS = 6  # of a residual block
_TRAIN_AGAIN = "train the model again"
_WEIGHTS, _FEATURES, _MIXED = "network.", "features.", "mixed."  # prefixes of tensor names


class CovariateState(Frozen):
    name: str
    covariate: Covariate
    levels: tuple[str, ...]
    mean: float
    deviation: Annotated[float, Field(gt=0)]
    offset: Annotated[float, Field(gt=0)]
    # Their values are the tensor features.<position of the covariate> (U, E).
    feature_labels: Annotated[tuple[str, ...], Field(min_length=1)] | None

    @classmethod
    def from_encoder(cls, encoder: CovariateEncoder) -> "CovariateState":
        names = ("name", "covariate", "levels", "mean", "deviation", "offset")
        labels = encoder.features and encoder.features.labels
        return cls(**{name: getattr(encoder, name) for name in names}, feature_labels=labels)

    def to_encoder(self, values: Tensor | None) -> CovariateEncoder:
        """`values` (U, E) are the features of an embedding."""
        features = None if values is None else FeatureTable(self.feature_labels, values.numpy())
        learned = self.levels, self.mean, self.deviation, self.offset
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
        encoders = [
            state.to_encoder(tensors.get(f"{_FEATURES}{position}"))
            for position, state in enumerate(self.covariates())
        ]
        remaining = iter(encoders)
        groups = {group: list(islice(remaining, len(getattr(self, group)))) for group in GROUPS}
        return MetadataEncoder(groups, list(self.dependencies))

    def covariates(self) -> list[CovariateState]:
        return [state for group in GROUPS for state in getattr(self, group)]


class MixedState(Frozen):
    """A mixed model without its tensors, and the network's weight beside it."""

    design: Design
    variances: Annotated[tuple[Variances, ...], Field(min_length=1)]
    network_weight: Annotated[float, Field(ge=0, le=1)]

    @classmethod
    def of(cls, mixed: MixedModel, network_weight: float) -> "MixedState":
        return cls(design=mixed.design, variances=mixed.variances, network_weight=network_weight)

    def to_model(self, tensors: Mapping[str, Tensor]) -> MixedModel:
        parts = (tensors[_MIXED + name] for name in MIXED_TENSORS)
        return MixedModel(self.design, self.variances, *parts)


class ModelDescription(Frozen):
    """A trained model without its tensors; its fields are the keys of the JSON."""

    format_version: Literal[11] = FORMAT_VERSION
    genes: Annotated[tuple[str, ...], Field(min_length=1)]
    gene_list_sha256: str
    metadata: MetadataState
    targets: TargetGenes
    model: Model
    hidden_study: str | None
    training_support: TrainingSupport
    label_form: LabelForm
    refit: bool
    temperatures: dict[
        str, Annotated[float, Field(ge=TEMPERATURE_RANGE[0], le=TEMPERATURE_RANGE[1])]
    ]
    mixed: MixedState | None


class Seeds(Frozen):
    """seeds/seeds.json: the training seeds of model.safetensors and of seeds/<seed>.safetensors."""

    first: Seed
    others: tuple[Seed, ...]


def read_seeds(path: Path) -> list[int]:
    """The training seeds of a model directory, the first first. InputError if the file is absent,
    IntegrityError if it is damaged, OSError if it cannot be read."""
    try:
        tensor_file.require_regular(path)
        seeds = Seeds.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: absent; `dvc repro` trains the models and writes it") from None
    except ValueError as error:
        problem = next(iter(str(error).splitlines()), "")
        raise refusal(path, f"not a list of seeds ({problem})") from None
    return [seeds.first, *seeds.others]


def pack(description: ModelDescription, tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a model file; the same for the same model. InputError if the description is
    too large for the format."""
    advice = "declare fewer covariates with many levels"
    return tensor_file.pack(description.model_dump_json(), tensors, advice)


def unpack(path: Path) -> tuple[ModelDescription, dict[str, Tensor]]:
    """The description and the tensors of a model file. InputError if the file is absent,
    IntegrityError if it is damaged or no model file, OSError if it cannot be read."""
    try:
        text, tensors = tensor_file.unpack(path)
        description = ModelDescription.model_validate_json(text)
    except FileNotFoundError:
        raise InputError(f"{path}: absent; `dvc repro` trains it") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise refusal(path, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except ValueError as error:
        raise refusal(path, f"not a GEM model file: {error}") from None
    problems = [*_tensor_problems(tensors), *_inconsistencies(description, tensors)]
    if problems:
        raise refusal(path, *problems)
    return description, tensors


def refusal(path: Path, *problems: str) -> IntegrityError:
    """The error for a model file with these problems."""
    return tensor_file.refusal(path, *problems, advice=_TRAIN_AGAIN)


def named_tensors(
    weights: Mapping[str, Tensor], encoder: MetadataEncoder, mixed: MixedModel | None = None
) -> dict[str, Tensor]:
    """Weights of the network, features of the covariates and effects of the mixed model, by their
    names in the file."""
    features = {
        f"{_FEATURES}{position}": torch.from_numpy(field.features.values)
        for position, field in enumerate(encoder.fields)
        if field.features
    }
    effects = {_MIXED + name: getattr(mixed, name) for name in MIXED_TENSORS} if mixed else {}
    return {_WEIGHTS + name: weight for name, weight in weights.items()} | features | effects


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


def _tensor_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        if not name.startswith((_WEIGHTS, _FEATURES, _MIXED)):
            problems.append(f"unknown tensor {name}")
        elif tensor.dtype != torch.float32:
            problems.append(f"{name} is {tensor.dtype}, expected torch.float32")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    return problems


def _inconsistencies(description: ModelDescription, tensors: Mapping[str, Tensor]) -> list[str]:
    """Contradictions between parts that are valid one by one."""
    genes, problems = description.genes, []
    if twice := _repeated(genes):
        problems.append(f"genes: {twice} occurs twice")
    if sha256_of(genes) != description.gene_list_sha256:
        problems.append("gene_list_sha256: not the hash of the genes")
    targets = description.targets.genes.items()
    if outside := [name for name, own in targets if not all(0 <= g < len(genes) for g in own)]:
        problems.append(f"targets: {examples(outside)} target none of the {len(genes)} genes")
    if twice := [name for name, own in targets if len(set(own)) < len(own)]:
        problems.append(f"targets: {examples(twice)} target a gene twice")
    # Even without memory for its weights, a network of many blocks takes seconds to build.
    blocks = 2 * (description.model.blocks + description.model.prior_blocks)
    if _BLOCK_TENSORS * blocks > len(tensors):
        problems.append(f"model: {blocks} blocks for {len(tensors)} tensors")
    covariates = description.metadata.covariates()
    problems += [f"metadata: {text}" for text in _covariate_problems(covariates)]
    problems += [f"metadata: {text}" for text in _feature_problems(covariates, tensors)]
    if not problems:
        problems += [f"mixed: {text}" for text in _mixed_problems(description, tensors)]
    levels = {covariate.name: set(covariate.levels) for covariate in covariates}
    for dependency in description.metadata.dependencies:
        ends = dependency.determinant, dependency.determined
        if not set(ends) <= levels.keys():
            problems.append(f"metadata: a dependency between unknown covariates {examples(ends)}")
        elif not (
            dependency.levels.keys() <= levels[ends[0]]
            and set(dependency.levels.values()) <= levels[ends[1]]
        ):
            problems.append(f"metadata: a dependency of {examples(ends)} on unknown levels")
    support = description.training_support
    if any(len(combination) != len(support.columns) for combination in support.combinations):
        problems.append(f"training_support: combinations not of {len(support.columns)} values")
    if len(set(support.combinations)) < len(support.combinations):
        problems.append("training_support: a combination occurs twice")
    return problems


def _covariate_problems(covariates: list[CovariateState]) -> list[str]:
    twice = _repeated(covariate.name for covariate in covariates)
    problems = [f"the covariate {twice} occurs twice"] if twice else []
    for covariate in covariates:
        # The order of levels gives the columns of the encoding their meaning: training sorts them.
        if list(covariate.levels) != sorted(set(covariate.levels)):
            problems.append(f"{covariate.name}: levels that are repeated or not sorted")
        is_numeric = isinstance(covariate.covariate, Numeric)
        if is_numeric and not {*covariate.levels} <= {DIMENSIONLESS, *UNITS}:
            problems.append(f"{covariate.name}: {examples(covariate.levels)} are no dimensions")
        if twice := _repeated(covariate.feature_labels or ()):
            problems.append(f"{covariate.name}: features of {twice} occur twice")
    return problems


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, number in Counter(names).items() if number > 1), None)


def _feature_problems(covariates: list[CovariateState], tensors: Mapping[str, Tensor]) -> list[str]:
    problems, expected = [], set()
    for position, covariate in enumerate(covariates):
        if covariate.feature_labels is None:
            if covariate.covariate.kind == "embedding":
                problems.append(f"{covariate.name}: an embedding without features")
            continue
        name = f"{_FEATURES}{position}"
        expected.add(name)
        if name not in tensors:
            problems.append(f"{covariate.name}: no tensor {name}")
        elif tensors[name].ndim != 2 or len(tensors[name]) != len(covariate.feature_labels):
            shape, labels = tuple(tensors[name].shape), len(covariate.feature_labels)
            problems.append(f"{covariate.name}: features of shape {shape} for {labels} labels")
    unknown = {name for name in tensors if name.startswith(_FEATURES)} - expected
    return problems + ([f"unknown features {examples(sorted(unknown))}"] if unknown else [])


def _mixed_problems(description: ModelDescription, tensors: Mapping[str, Tensor]) -> list[str]:
    """Terms that the covariates do not have, and tensors that do not fit the terms."""
    names = {name.removeprefix(_MIXED) for name in tensors if name.startswith(_MIXED)}
    if description.mixed is None:
        return [f"tensors without terms: {examples(sorted(names))}"] if names else []
    if names != set(MIXED_TENSORS):
        return [f"tensors {examples(sorted(names))}, expected {examples(MIXED_TENSORS)}"]
    design, genes = description.mixed.design, len(description.genes)
    if problems := design.problems(_factor_widths(description, tensors)):
        return problems
    if wrong := [problem for v in description.mixed.variances for problem in v.problems(design)]:
        return wrong
    expected = {"coefficients": (design.width, genes)}
    return [
        f"{name} has shape {shape}, expected {expected.get(name, (genes,))}"
        for name in MIXED_TENSORS
        if (shape := tuple(tensors[_MIXED + name].shape)) != expected.get(name, (genes,))
    ]


def _factor_widths(
    description: ModelDescription, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, int]]:
    """Columns of the factors of each covariate, by kind."""
    widths: dict[str, dict[str, int]] = {}
    control = description.mixed.design.control
    for position, covariate in enumerate(description.metadata.covariates()):
        own = widths[covariate.name] = {"levels": len(covariate.levels)}
        if isinstance(covariate.covariate, Numeric):
            own["smooth"] = len(covariate.levels)
        if covariate.feature_labels is not None:
            own["features"] = tensors[f"{_FEATURES}{position}"].shape[1]
        if control is not None and covariate.name == control.column:
            own["treated"] = 1
            own["treatment"] = sum(level != control.value for level in covariate.levels)
    return widths
