"""params.yaml as frozen, typed models without defaults: every value is in the file.

`read_params` reports every unknown key, missing key, wrong type and value out of range at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config_errors import validation_error
from pipeline.gem.common.schema.splits import Splits
from pipeline.gem.common.schema.types import (
    Count,
    FilePath,
    FilePaths,
    Frozen,
    Names,
    Probability,
    Seed,
    Seeds,
    Share,
    Text,
    Weight,
    integer,
    number,
)
from pipeline.gem.common.yaml_file import flatten, set_dotted

GROUPS = ("technical", "biological", "perturbation")

SEARCH_NAME = r"^[A-Za-z0-9_]{1,100}$"  # a search names a file and a folder


class Synthesize(Frozen):
    seed: Seed
    samples: integer(50, 10**9)
    genes: integer(20, 10**6)
    preset: Literal["bulk", "single_cell"]
    depth: integer(100, 10**9) | None
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
    program_share: Annotated[float, Field(gt=0, le=1)]
    embedding_size: Count
    null_share: Probability
    response_spread: number(0, 3)
    silent_share: Probability
    context_specific_share: Probability
    saturation_fold: number(1.1, 1e6) | None
    hill_spread: number(0, 3)
    double_share: Probability
    interaction_spread: number(0, 3)
    dispersion_degrees: number(1, 1e6)
    depth_spread: number(0, 3)
    undetected_share: Share
    subpopulations: integer(1, 100)
    missing_sex: Probability
    missing_age: Share
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


class Labels(Frozen):
    min_count: Count = 1  # labels in fewer training samples are unknown to the model


class Categorical(Labels):
    """One label: encoded one-hot."""

    kind: Literal["categorical"]


class Multilabel(Labels):
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


class Embedding(Labels):
    """One label or several, with features in one table or several: their sum, beside a multi-hot
    identity."""

    kind: Literal["embedding"]
    table: FilePath | None = None
    tables: FilePaths | None = None  # instead; their features are concatenated

    @model_validator(mode="after")
    def _one_key(self):
        if (self.table is None) == (self.tables is None):
            raise ValueError("expected table: PATH, or tables: [PATH, PATH]")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return self.tables or (self.table,)


Covariate = Annotated[
    Categorical | Multilabel | Numeric | Quantity | Embedding, Field(discriminator="kind")
]


class Covariates(Frozen):
    technical: dict[Text, Covariate]
    biological: dict[Text, Covariate]
    perturbation: dict[Text, Covariate]

    @model_validator(mode="after")
    def _one_group_each(self):
        names = [name for group in GROUPS for name in getattr(self, group)]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"{', '.join(duplicates)} is declared in more than one group")
        return self

    def embeddings(self) -> dict[str, tuple[str, ...]]:
        """Paths of the feature tables by covariate."""
        covariates = self.all().items()
        return {name: each.paths for name, each in covariates if each.kind == "embedding"}

    def identities(self) -> "Covariates":
        """The same with each embedding as a multilabel, without features."""
        groups = {group: dict(getattr(self, group)) for group in GROUPS}
        for fields in groups.values():
            for name in fields.keys() & self.embeddings():
                fields[name] = Multilabel(kind="multilabel", min_count=fields[name].min_count)
        return self.model_copy(update=groups)

    def all(self) -> dict[str, Covariate]:
        groups = (getattr(self, group) for group in GROUPS)
        return {name: covariate for group in groups for name, covariate in group.items()}


class Control(Frozen):
    column: Text
    value: Text


class Data(Frozen):
    source: FilePath
    layer: Text | None
    sample_id: Text | None
    covariates: Covariates
    context_columns: Names
    control: Control | None
    target_gene: FilePath | None
    date_column: Text | None
    study_column: Text | None
    level_column: Text | None
    missing_values: Annotated[dict[Text, Names], Field(max_length=1000)]
    min_gene_samples: integer(0, 10**9)
    min_gene_total: integer(0, 10**15)
    gene_list: FilePath | None
    highly_variable: Count | None
    empty_samples: Literal["refuse", "drop"]

    def columns(self) -> set[str]:
        """All columns of the samples that are declared."""
        others = {self.date_column, self.study_column, self.level_column}
        others.add(self.control and self.control.column)
        return {*self.covariates.all(), *self.context_columns} | others - {None}

    @model_validator(mode="after")
    def _levels_are_no_perturbations(self):
        if self.control is not None and self.level_column == self.control.column:
            raise ValueError(
                f"level_column is {self.level_column}, the column of the control; "
                "hold out perturbations by splits.perturbation, or name another column"
            )
        return self

    @model_validator(mode="after")
    def _missing_values_of_columns(self):
        if unknown := sorted(self.missing_values.keys() - self.columns()):
            names = ", ".join(unknown)
            raise ValueError(f"missing_values names {names}, no column that data declares")
        return self


class Latent(Frozen):
    technical: integer(1, 4096) | None
    biological: integer(1, 4096)
    perturbation: integer(1, 4096)


class Model(Frozen):
    latent: Latent
    hidden: integer(1, 2**16)
    blocks: integer(0, 1000)
    prior_blocks: integer(0, 1000)
    expansion: integer(1, 1000)
    dropout: Probability
    linear_decoder: bool
    additive_technical: bool
    interactions: integer(0, 2**16)
    mixed_model: bool
    observation: Literal["auto", "normal", "negative_binomial", "multinomial"]
    min_variance: number(1e-6, 1000)

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
    technical: Weight
    biological: Weight
    perturbation: Weight


class MetadataDropout(Frozen):
    technical: Probability
    biological: Probability
    perturbation: Probability


class Train(Frozen):
    seeds: Seeds
    kl_weight: KLWeight
    kl_warmup: number(0, 1)
    predictive_weight: Weight
    reference_weight: Weight
    reference_share: Annotated[float, Field(gt=0, le=1)]
    simulated_batch_effects: Probability
    unseen_study_weight: Weight
    partial_metadata_weight: Weight
    classifier_weight: Weight
    free_bits: number(0, 1000)
    metadata_dropout: MetadataDropout
    identity_dropout: Probability
    epochs: integer(1, 10**5)
    min_steps: integer(0, 10**8)
    patience: Count
    refit: number(0, 10)
    batch_size: Count
    learning_rate: number(1e-8, 1)
    weight_decay: number(0, 1000)
    gradient_clip: number(1e-6, 1e9)
    predictive_draws: integer(1, 10**4)
    device: Literal["auto", "cpu", "cuda"]
    memory_share: number(0, 1)
    precision: Literal["auto", "float32", "bf16"]
    threads: integer(1, 1024)

    @model_validator(mode="after")
    def _decays(self):
        decay = self.learning_rate * self.weight_decay
        if decay >= 1:
            raise ValueError(f"learning_rate x weight_decay is {decay:g}; expected less than 1")
        return self


class Tune(Frozen):
    trials: Count


class Evaluate(Frozen):
    search: Annotated[str, Field(pattern=SEARCH_NAME, max_length=100)]
    seed: Seed
    split_samples: integer(2, 10**7)
    bootstrap: integer(20, 10**6)
    prior_draws: integer(1, 10**4)


class Tracking(Frozen):
    experiment: Text


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
        """Values of the named sections (of all if none is named) by dotted name, no defaults."""
        dump = self.model_dump(mode="json", include=set(sections) or None, exclude_defaults=True)
        return flatten(dump)

    def override(self, changes: Mapping[str, object]) -> "Params":
        """A validated copy with the changes (by dotted name)."""
        return Params.model_validate(set_dotted(self.model_dump(mode="json"), changes))


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
