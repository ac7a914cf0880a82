"""params.yaml as frozen, typed models without defaults: every value is in the file.

`read_params` reports every unknown key, missing key, wrong type and value out of range at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config_errors import validation_error
from pipeline.gem.common.errors import InputError

GROUPS = ("technical", "biological", "perturbation")

Share = Annotated[float, Field(ge=0, le=0.5)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
SEARCH_NAME = r"^[A-Za-z0-9_]+$"  # a search names a file and a folder


class Frozen(BaseModel):
    """A model without unknown keys, type conversion or mutation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Synthesize(Frozen):
    seed: Seed
    samples: Annotated[int, Field(ge=50)]
    genes: Annotated[int, Field(ge=20)]
    preset: Literal["bulk", "single_cell"]
    depth: Annotated[int, Field(ge=100, le=10**9)] | None
    studies: Count
    tissues: Count
    cell_types_per_tissue: Count
    perturbations: Count
    contexts_per_study: Count
    perturbations_per_study: Count
    control_share: Annotated[float, Field(gt=0, lt=1)]
    strata_per_study: Count
    donors_per_stratum: Count
    mechanisms: Count
    embedding_size: Count
    null_share: Probability
    missing_sex: Probability
    missing_age: Annotated[float, Field(ge=0, le=0.5)]
    wrong_sex: Share

    @model_validator(mode="after")
    def _fits(self):
        if self.perturbations_per_study > self.perturbations:
            raise ValueError(
                f"perturbations_per_study ({self.perturbations_per_study}) is more than "
                f"perturbations ({self.perturbations})"
            )
        contexts = self.tissues * self.cell_types_per_tissue
        if self.contexts_per_study > contexts:
            raise ValueError(
                f"contexts_per_study ({self.contexts_per_study}) is more than "
                f"the number of contexts ({contexts})"
            )
        return self


class Categorical(Frozen):
    """One label: encoded one-hot."""

    kind: Literal["categorical"]


class Multilabel(Frozen):
    """Several labels, "a|b": encoded multi-hot."""

    kind: Literal["multilabel"]


class Numeric(Frozen):
    """A number: standardised on the training split. All cells have one dimension: they are plain,
    or times, or doses of one kind."""

    kind: Literal["numeric"]
    scale: Literal["linear", "log"]

    @property
    def plain_unit(self) -> str | None:
        """The unit of cells without one."""
        return None


Unit = Literal[
    *("any", "s", "min", "h", "d", "week", "month", "year"),
    *("fM", "pM", "nM", "uM", "mM", "M", "pg/ml", "ng/ml", "ug/ml", "mg/ml"),
    *("ug/kg", "mg/kg", "g/kg", "mGy", "cGy", "Gy"),
]


class Quantity(Numeric):
    """A number with a declared unit, that of plain cells: 24 is 24h. `any` is no unit, but allows
    several dimensions in one column."""

    kind: Literal["quantity"]
    unit: Unit

    @property
    def plain_unit(self) -> str | None:
        return None if self.unit == "any" else self.unit


class Embedding(Frozen):
    """One label or several, with features in a table: their sum, beside a multi-hot identity."""

    kind: Literal["embedding"]
    table: str


Covariate = Annotated[
    Categorical | Multilabel | Numeric | Quantity | Embedding, Field(discriminator="kind")
]


class Covariates(Frozen):
    technical: dict[str, Covariate]
    biological: dict[str, Covariate]
    perturbation: dict[str, Covariate]

    @model_validator(mode="after")
    def _one_group_each(self):
        names = [name for group in GROUPS for name in getattr(self, group)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"{', '.join(duplicates)} is declared in more than one group")
        return self

    def embeddings(self) -> dict[str, str]:
        """Path of the feature table by covariate."""
        return {
            name: covariate.table
            for name, covariate in self.all().items()
            if covariate.kind == "embedding"
        }

    def identities(self) -> "Covariates":
        """The same with each embedding as a multilabel, without features."""
        multilabel = Multilabel(kind="multilabel")
        return Covariates.model_validate(
            {
                group: {
                    name: multilabel if covariate.kind == "embedding" else covariate
                    for name, covariate in getattr(self, group).items()
                }
                for group in GROUPS
            }
        )

    def all(self) -> dict[str, Covariate]:
        return {
            name: covariate for group in GROUPS for name, covariate in getattr(self, group).items()
        }


class Control(Frozen):
    column: str
    value: str


class Data(Frozen):
    source: str
    layer: str | None
    sample_id: str | None
    covariates: Covariates
    context_columns: Names
    control: Control | None
    target_gene: str | None
    date_column: str | None
    study_column: str | None
    missing_values: dict[str, Names]
    min_gene_samples: Annotated[int, Field(ge=0)]
    min_gene_total: Annotated[int, Field(ge=0)]
    gene_list: str | None
    highly_variable: Count | None
    empty_samples: Literal["refuse", "drop"]

    @model_validator(mode="after")
    def _missing_values_of_columns(self):
        columns = [*self.covariates.all(), *self.context_columns]
        columns += [self.date_column, self.study_column]
        columns += [self.control.column] if self.control else []
        if unknown := [name for name in self.missing_values if name not in columns]:
            raise ValueError(
                f"missing_values names {', '.join(unknown)}, no column that data declares"
            )
        return self


# Held-out pairs of context and perturbation: a share of them, or mappings of column to value.
Pairs = Annotated[tuple[Annotated[dict[str, str], Field(min_length=1)], ...], Field(strict=False)]
Combination = Annotated[
    Annotated[Share, Tag("share")] | Annotated[Pairs, Tag("pairs")],
    Discriminator(lambda value: "pairs" if isinstance(value, (list, tuple)) else "share"),
]


class Splits(Frozen):
    seed: Seed
    validation: Share
    test_random: Share
    test_control: Share
    combination: Combination
    validation_combination: Combination
    perturbation: Share
    study: Share


class Latent(Frozen):
    technical: Annotated[int, Field(ge=1, le=4096)] | None
    biological: Annotated[int, Field(ge=1, le=4096)]
    perturbation: Annotated[int, Field(ge=1, le=4096)]


class Model(Frozen):
    latent: Latent
    hidden: Count
    blocks: Annotated[int, Field(ge=0)]
    prior_blocks: Annotated[int, Field(ge=0)]
    expansion: Count
    dropout: Probability
    linear_decoder: bool
    additive_technical: bool
    interactions: Annotated[int, Field(ge=0)]
    observation: Literal["normal", "negative_binomial", "multinomial"]
    min_variance: Positive

    @property
    def uses_counts(self) -> bool:
        """Whether the observation model is a distribution of counts."""
        return self.observation != "normal"

    @model_validator(mode="after")
    def _fits(self):
        if self.additive_technical and not self.linear_decoder:
            raise ValueError(
                "additive_technical needs the linear decoder: "
                "set linear_decoder to true, or additive_technical to false"
            )
        return self


class KLWeight(Frozen):
    technical: NonNegative
    biological: NonNegative
    perturbation: NonNegative


class MetadataDropout(Frozen):
    technical: Probability
    biological: Probability
    perturbation: Probability


class Train(Frozen):
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    kl_weight: KLWeight
    kl_warmup: Annotated[float, Field(ge=0, le=1)]
    predictive_weight: NonNegative
    reference_weight: NonNegative
    reference_share: Annotated[float, Field(gt=0, le=1)]
    simulated_batch_effects: Probability
    unseen_study_weight: NonNegative
    partial_metadata_weight: NonNegative
    classifier_weight: NonNegative
    free_bits: NonNegative
    metadata_dropout: MetadataDropout
    identity_dropout: Probability
    epochs: Count
    min_steps: Annotated[int, Field(ge=0)]
    patience: Count
    batch_size: Count
    learning_rate: Positive
    weight_decay: NonNegative
    small_cohort: Annotated[int, Field(ge=0)]
    gradient_clip: Positive
    predictive_draws: Count
    device: Literal["auto", "cpu", "cuda"]
    threads: Count


class Tune(Frozen):
    trials: Count


class Evaluate(Frozen):
    search: Annotated[str, Field(pattern=SEARCH_NAME)]
    seed: Seed
    bootstrap: Annotated[int, Field(ge=20)]
    prior_draws: Count


class Tracking(Frozen):
    experiment: Annotated[str, Field(min_length=1)]


class Params(Frozen):
    synthesize: Synthesize
    data: Data
    splits: Splits
    model: Model
    train: Train
    tune: Tune
    evaluate: Evaluate
    tracking: Tracking

    def flat(self, *sections: str) -> dict[str, object]:
        """Values by dotted name, of the named sections (of all if none is named)."""
        return flatten(self.model_dump(mode="json", include=set(sections) or None))

    def override(self, changes: Mapping[str, object]) -> "Params":
        """A validated copy with the changes (by dotted name)."""
        return Params.model_validate(set_dotted(self.model_dump(mode="json"), changes))


def flatten(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one mapping with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def set_dotted(values: dict, changes: Mapping[str, object]) -> dict:
    """Sets `changes` (by dotted name) in the nested `values`; creates absent parents.

    InputError if a parent is not a mapping.
    """
    for name, value in changes.items():
        *parents, last = name.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise InputError(f"{name} is unknown: {parent} is a single value, {target!r}")
        target[last] = value
    return values


def read_params(path: Path | str = "params.yaml") -> Params:
    """The validated parameters. InputError lists every problem, with file, line and dotted key."""
    return read_model(path, Params)


def read_model(path: Path | str, model: type[Frozen]):
    """A YAML file as a validated model. InputError lists every problem, with file and line."""
    document = yaml_file.read(path)
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        raise validation_error(error, model, document) from None
