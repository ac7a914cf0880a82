"""Validation of a query against a model, before anything is predicted."""

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.labels import LabelForm, cell_value, looks_missing
from pipeline.gem.data.tables import identifier
from pipeline.gem.data.units import cell_repr
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction.query_table import (
    REFERENCE_ID,
    SAMPLE_ID,
    SCAN_ROWS,
    QueryFile,
    QueryFrame,
    known_columns,
    plain_values,
)

logger = logging.getLogger(__name__)
_MAX_PROBLEMS = 20  # listed per column; further ones are counted
_MAX_CHECKED = 2**16  # values of a column that are remembered as checked


def check_query(
    query: QueryFile | QueryFrame,
    gem: TrainedGEM,
    unknown: str,
    reference_ids: Collection[str] | None,
) -> None:
    """InputError lists the problems of all rows. Warns of columns that have no effect.

    `unknown` is "refuse" or "missing". `reference_ids` are the names of the reference samples,
    None without any.
    """
    names, known = query.schema.names, known_columns(gem)
    nested = [
        name
        for name in names
        if name in (*known, REFERENCE_ID) and pa.types.is_nested(query.schema.field(name).type)
    ]
    problems = _table_problems(query, known, reference_ids)
    for name in nested:
        kind = query.schema.field(name).type
        problems.append(f"{query.path}: column {name} holds {kind}; expected one value per cell")
    checks = {}
    for encoder in gem.metadata.fields:
        if encoder.name in names and encoder.name not in nested:
            checks[encoder.name] = partial(_covariate_problem, encoder, gem.label_form, unknown)
    if reference_ids is not None and REFERENCE_ID in names and REFERENCE_ID not in nested:
        checks[REFERENCE_ID] = partial(_reference_problem, frozenset(reference_ids))
    problems += _value_problems(query, checks)
    if problems:
        raise InputError(*problems)
    _warn_of_unused_columns(query, known, reference_ids is not None)


def _table_problems(
    query: QueryFile | QueryFrame, known: list[str], reference_ids: Collection[str] | None
) -> list[str]:
    names, problems = query.schema.names, []
    if not query.rows:
        problems.append(f"{query.path}: no rows; give one row per experiment")
    near = {_alike(name): name for name in (*known, REFERENCE_ID)}
    for name in names:
        meant = near.get(_alike(name))
        if meant and meant not in names and name not in known:
            problems.append(f"{query.path}: column {name!r} is not {meant!r}; rename it")
    if reference_ids is None and not problems and not set(names) & set(known):
        problems.append(
            f"{query.path}: none of its columns is known to the model: "
            f"it has {examples(names)}; known: {examples(known, 12)}"
        )
    if reference_ids is not None and len(reference_ids) > 1 and REFERENCE_ID not in names:
        problems.append(
            f"{query.path}: {len(reference_ids):,} references; add a column {REFERENCE_ID} "
            "with the reference of each row"
        )
    return problems


def _alike(name: str) -> str:
    """A name of a column without what is easily written differently: case, space, punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold()) or name


def _warn_of_unused_columns(
    query: QueryFile | QueryFrame, known: list[str], has_references: bool
) -> None:
    for name in query.schema.names:
        if name == REFERENCE_ID and not has_references:
            logger.warning("%s: column %s is ignored without references", query.path, name)
        elif name not in (*known, SAMPLE_ID, REFERENCE_ID):
            logger.warning(
                "%s: column %s is unknown to the model; it is copied to the output only%s",
                query.path,
                name,
                did_you_mean(name, known),
            )


@dataclass
class _ColumnCheck:
    """Checks each distinct value of a column once; a problem names the first row with the value."""

    where: str
    problem_of: Callable[[object], str | None]
    problems: list[str] = field(default_factory=list)
    unlisted: int = 0
    checked: set = field(default_factory=set)

    def scan(self, values: pa.Array, first_row: int) -> None:
        for scalar in pc.unique(values):
            value = cell_value(scalar.as_py())
            if value in self.checked:
                continue
            self.checked.add(value)
            problem = self.problem_of(value)
            if problem and len(self.problems) < _MAX_PROBLEMS:
                row = first_row + _first_row(values, scalar)
                self.problems.append(f"{self.where}, row {row}: {problem}")
            elif problem:
                self.unlisted += 1
        if len(self.checked) > _MAX_CHECKED:
            self.checked.clear()

    def all_problems(self) -> list[str]:
        if not self.unlisted:
            return self.problems
        return [*self.problems, f"{self.where}: and {self.unlisted:,} more values like these"]


def _value_problems(
    query: QueryFile | QueryFrame, problem_of: dict[str, Callable[[object], str | None]]
) -> list[str]:
    checks = {
        name: _ColumnCheck(f"{query.path}: {name}", call) for name, call in problem_of.items()
    }
    first_row = 0
    for table in query.blocks(SCAN_ROWS) if checks else ():
        for name, check in checks.items():
            check.scan(plain_values(table[name]), first_row)
        first_row += len(table)
    return [problem for check in checks.values() for problem in check.all_problems()]


def _first_row(values: pa.Array, scalar: pa.Scalar) -> int:
    if scalar.as_py() is None:
        return pc.index(pc.is_null(values), True).as_py()
    return pc.index(values, scalar).as_py()


def _covariate_problem(
    encoder: CovariateEncoder, form: LabelForm, unknown: str, value: object
) -> str | None:
    value = form.cell(encoder.name, value)
    problem = None if value is None else encoder.try_encode(value, unknown)[1]
    if problem and looks_missing(value):
        problem += "; leave the cell empty where a value is missing"
    return problem


def _reference_problem(reference_ids: frozenset[str], value: object) -> str | None:
    if value is None:
        return "no reference; name one in every row"
    if identifier(value) in reference_ids:
        return None
    suggestion = did_you_mean(value, sorted(reference_ids))
    return f"no reference is named {cell_repr(value)}{suggestion}"
