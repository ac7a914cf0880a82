"""What the benchmark has to know of a cohort: a YAML file beside its .h5ad.

The project ships those of some public cohorts beside this module. One beside the .h5ad comes
first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Count, Data, Frozen, Params, Text, read_model
from pipeline.gem.common.config_errors import validation_error
from pipeline.gem.common.errors import GemError, InputError, did_you_mean
from pipeline.gem.common.files import sha256
from pipeline.gem.common.yaml_file import Document, flatten, set_dotted

SHIPPED = Path(__file__).parent
SYNTHETIC = ("synthetic", "synthetic_experiment")  # simulated cohorts, which need no .h5ad
FOLDS = 10

# Of params.yaml these name columns and tables of another cohort.
_ABSENT = {
    "layer": None,
    "sample_id": None,
    "target_gene": None,
    "date_column": None,
    "study_column": None,
    "level_column": None,
    "gene_list": None,
    "missing_values": {},
}
_TABLES = ("target_gene", "gene_list")  # paths; relative ones start at the folder of the YAML

HoldOut = Literal["pairs", "conditions", "contexts", "levels", "studies", "samples"]


class Declaration(Frozen):
    """A cohort of the benchmark. `data` and `synthesize` change these sections of params.yaml."""

    data: dict[Text, object] | None = None  # covariates, context_columns, control, ...
    synthesize: dict[Text, object] | None = None  # instead of data: a simulated cohort
    hold_out: HoldOut
    column: Text | None = None  # whose values `levels` holds out
    at_most: Count = FOLDS  # folds, drawn by seed
    at_once: Count = 1  # pairs, conditions, contexts, levels or studies that a fold holds out
    share: float = Field(default=0.2, gt=0, le=0.5)  # of the samples of a fold, for `samples`
    cells: Literal["means", "sums"] | None = None  # single cells, and what ranks and wins compare

    @model_validator(mode="after")
    def _one_source(self):
        if (self.data is None) == (self.synthesize is None):
            raise ValueError("expected either data or synthesize")
        return self

    @model_validator(mode="after")
    def _column_of_levels(self):
        if (self.column is None) == (self.hold_out == "levels"):
            raise ValueError("expected column, whose values are held out, with hold_out: levels")
        return self


@dataclass(frozen=True)
class CohortTask:
    """A cohort of a run: its declaration, and params.yaml with the changes of both."""

    name: str
    declaration: Declaration
    params: Params  # data.source is the .h5ad; of a simulated cohort a folder that is still absent
    files: tuple[Path, ...]  # that decide the result beside the settings

    @property
    def scale(self) -> str:
        """Of the scores that ranks and wins compare."""
        return self.declaration.cells or "means"

    def identity(self) -> list:
        """Plain values; equal for equal data and settings, wherever the files are."""
        settings = self.params.flat("splits", "model", "train", "evaluate")
        data = self.params.flat("data")
        data = {key: value for key, value in data.items() if not _is_path(key)}
        simulated = self.params.flat("synthesize") if self.declaration.synthesize else None
        return [
            self.declaration.model_dump(mode="json", exclude={"data", "at_most"}),
            settings,
            data,
            simulated,
            [sha256(path) for path in self.files],
        ]


def _is_path(key: str) -> bool:
    name = key.removeprefix("data.")
    return name in ("source", *_TABLES) or name.endswith((".table", ".tables"))


def cohort_names(folder: Path) -> list[str]:
    """The cohorts of a folder in alphabetical order, and the simulated ones. InputError without."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with .h5ad files")
    return [*sorted(path.stem for path in folder.glob("*.h5ad")), *SYNTHETIC]


def read_task(name: str, folder: Path, params: Params, folds: int | None = None) -> CohortTask:
    """The cohort `name` of a folder, with at most `folds`. InputError lists every problem of its
    YAML."""
    known = cohort_names(folder)
    if name not in known:
        raise InputError(f"{folder}: no cohort {name}{did_you_mean(name, known)}")
    path = declaration_path(name, folder)
    declaration = read_model(path, Declaration)
    if folds is not None:
        declaration = declaration.model_copy(update={"at_most": min(folds, declaration.at_most)})
    if declaration.synthesize is not None:
        changed = _with_level(_simulated(params, declaration, path), declaration)
        return CohortTask(name, declaration, changed, ())
    source = folder / f"{name}.h5ad"
    data = _data(declaration, source, path, params)
    changed = _with_level(params.model_copy(update={"data": data}), declaration)
    _check_hold_out(declaration, changed, path)
    embeddings = data.covariates.embeddings().values()
    tables = [data.target_gene, data.gene_list, *(path for paths in embeddings for path in paths)]
    files = tuple(Path(table) for table in tables if table)
    if absent := [file for file in files if not file.is_file()]:
        raise InputError(*(f"{path}: data: {file} does not exist" for file in absent))
    return CohortTask(name, declaration, changed, (source, *files))


def declaration_path(name: str, folder: Path) -> Path:
    """The YAML beside the .h5ad, else the one that the project ships."""
    candidates = [folder / f"{name}.yaml", SHIPPED / f"{name}.yaml"]
    for path in candidates:
        if path.exists():
            return path
    raise InputError(
        f"{candidates[0]}: absent; it declares covariates, context_columns and control of "
        f"{name}.h5ad (docs/real_cohorts.md)"
    )


def _data(declaration: Declaration, source: Path, path: Path, params: Params) -> Data:
    """The section `data`. InputError names the file of the declaration and the line."""
    document = yaml_file.read(path)
    values = params.data.model_dump(mode="json") | _ABSENT
    for required in ("covariates", "context_columns", "control"):
        if required not in declaration.data:
            raise InputError(f"{document.where(('data',))}: data.{required}: missing; add it")
    values |= declaration.data | {"source": str(source)}
    groups = values["covariates"]
    if isinstance(groups, dict):
        values["covariates"] = {"technical": {}, "biological": {}, "perturbation": {}} | groups
    try:
        data = Data.model_validate(values)
    except ValidationError as error:
        raise validation_error(error, Data, _section(document, "data")) from None
    return _with_tables_of(path.parent, data)


def _section(document: Document, name: str) -> Document:
    """A section as a document: its keys have their lines."""
    parts = {
        field: {
            key[1:]: value for key, value in getattr(document, field).items() if key[:1] == (name,)
        }
        for field in ("lines", "nodes", "colons")
    }
    return Document(document.path, document.text, document.values[name], **parts)


def _with_tables_of(folder: Path, data: Data) -> Data:
    """Paths of tables relative to the folder of the declaration."""
    values = data.model_dump(mode="json")
    for name in _TABLES:
        if values[name]:
            values[name] = str(folder / values[name])
    for group in values["covariates"].values():
        for covariate in group.values():
            if covariate.get("table"):
                covariate["table"] = str(folder / covariate["table"])
            if covariate.get("tables"):
                covariate["tables"] = [str(folder / path) for path in covariate["tables"]]
    return Data.model_validate(values)


def _simulated(params: Params, declaration: Declaration, path: Path) -> Params:
    changes = {f"synthesize.{key}": value for key, value in flatten(declaration.synthesize).items()}
    try:
        return params.override(changes)
    except ValidationError as error:
        document = yaml_file.read(path)
        raise validation_error(error, Params, document) from None


def at_source(params: Params, folder: Path) -> Params:
    """The settings of a simulated cohort with its source in `folder`."""
    values = params.model_dump(mode="json")
    former, data = Path(params.data.source), values["data"]

    def moved(text: str) -> str:
        path = Path(text)
        return str(folder / path.relative_to(former)) if path.is_relative_to(former) else text

    changes = {"data.source": str(folder)}
    changes |= {f"data.{name}": moved(data[name]) for name in _TABLES if data[name]}
    for group, covariates in data["covariates"].items():
        for name, covariate in covariates.items():
            key = f"data.covariates.{group}.{name}"
            if covariate.get("table"):
                changes[f"{key}.table"] = moved(covariate["table"])
            if covariate.get("tables"):
                changes[f"{key}.tables"] = [moved(path) for path in covariate["tables"]]
    return Params.model_validate(set_dotted(values, changes))


def _with_level(params: Params, declaration: Declaration) -> Params:
    data = params.data.model_copy(update={"level_column": declaration.column})
    return params.model_copy(update={"data": data})


def _check_hold_out(declaration: Declaration, params: Params, path: Path) -> None:
    if declaration.hold_out != "samples" and params.data.control is None:
        raise InputError(
            f"{path}: hold_out: {declaration.hold_out} needs data.control, which says what is "
            "treated; declare the control, or hold out samples"
        )
    if declaration.hold_out == "studies" and params.data.study_column is None:
        raise InputError(f"{path}: hold_out: studies needs data.study_column; name the column")
    if declaration.column is not None and declaration.column == params.data.control.column:
        raise InputError(
            f"{path}: column: {declaration.column} names the control; hold out pairs or conditions"
        )
    if declaration.hold_out == "samples" and declaration.cells:
        raise InputError(
            f"{path}: cells: sums of cells need whole conditions held out; hold out pairs, "
            "conditions or contexts, or remove cells"
        )


def parse_settings(texts: list[str]) -> dict[str, object]:
    """`train.epochs=3` as {"train.epochs": 3}. InputError for text without `=`, or a key twice."""
    changes: dict[str, object] = {}
    for key, value in map(_assignment, texts):
        if key in changes:
            raise InputError(f"--set {key}: appears twice; remove one")
        changes[key] = value
    return changes


def _assignment(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"--set {text}: expected KEY=VALUE, such as train.epochs=3")
    return key.strip(), yaml_file.parse_scalar(value)


def with_settings(params: Params, changes: Mapping[str, object], where: str = "--set") -> Params:
    """InputError, with the key, for a change that params.yaml does not allow. `where`: the place of
    the changes, for its messages."""
    try:
        return params.override(changes)
    except ValidationError as error:
        raise InputError(*(f"{where}: {line}" for line in _lines(error))) from None
    except GemError as error:
        raise InputError(*(f"{where}: {line}" for line in error.problems)) from None


def _lines(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        yield f"{key}: {problem['msg']}, got {problem.get('input')!r}"
