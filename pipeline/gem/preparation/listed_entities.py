"""Held-out entities that params.yaml names: lists of mappings of column to value.

A mapping names every entity with a treated sample that matches it. Quantities match in any unit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Numeric, Splits
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.labels import LabelForm, label_texts
from pipeline.gem.data.splits import Entities


class ListedKind(NamedTuple):
    """What a mapping can name."""

    attribute: str  # of Entities: the name of each sample's entity
    plural: str
    home: str  # where params.yaml declares the columns that define it
    advice: str


_PAIRS = ListedKind(
    "pair",
    "pairs",
    "data.context_columns and data.control",
    "list a measured pair of context and perturbation",
)
# Parameter of splits to what it lists. Each is a share, or a list of mappings.
KINDS = {
    "combination": _PAIRS,
    "validation_combination": _PAIRS,
    "condition": ListedKind(
        "condition",
        "conditions",
        "data.context_columns, data.control and data.covariates.perturbation",
        "list values that were measured together",
    ),
    "context": ListedKind(
        "treated_context",
        "contexts",
        "data.context_columns",
        "list a context with treated samples",
    ),
    "level": ListedKind(
        "treated_level",
        "levels",
        "data.level_column",
        "list a level with treated samples",
    ),
    "perturbation": ListedKind(
        "perturbation",
        "perturbations",
        "data.control",
        "list a measured perturbation",
    ),
    "study": ListedKind("study", "studies", "data.study_column", "list a study of the source"),
}
_WHOLE = ("context", "level", "perturbation", "study")  # what takes all samples of a part


@dataclass(frozen=True)
class Listed:
    """The entities that the mappings of one parameter name."""

    by_mapping: tuple[tuple[frozenset[str], frozenset[str]], ...] = ()  # (columns, entities)

    @property
    def names(self) -> list[str]:
        return sorted(set().union(*(names for _, names in self.by_mapping)))

    def named_by(self, columns: Iterable[str]) -> list[str]:
        """Those of the mappings with any of the columns."""
        wanted = set(columns)
        return sorted(set().union(*(names for own, names in self.by_mapping if own & wanted)))


@dataclass(frozen=True)
class Lists:
    """The listed entities by parameter of splits; none where it is a share."""

    combination: Listed
    validation_combination: Listed
    condition: Listed
    context: Listed
    level: Listed
    perturbation: Listed
    study: Listed

    @property
    def pairs(self) -> list[str]:
        """For the test and for validation."""
        return [*self.combination.names, *self.validation_combination.names]


def read_lists(samples: pd.DataFrame, entities: Entities, data: Data, params: Splits) -> Lists:
    """The entities of treated samples that match the lists. InputError has every problem."""
    lists: dict[str, Listed] = {}
    problems: list[str] = []
    covariates = data.covariates.all().items()
    units = {name: item.plain_unit for name, item in covariates if isinstance(item, Numeric)}
    form = replace(LabelForm.of(data), units=units)
    for parameter, kind in KINDS.items():
        value, named = getattr(params, parameter), []
        for number, mapping in enumerate(value if isinstance(value, tuple) else ()):
            where = f"{data.source}: splits.{parameter}.{number}"
            mapping = {column: form.text(column, text) or text for column, text in mapping.items()}
            if invalid := _mapping_problems(mapping, samples, data, kind, where):
                problems += invalid
                continue
            columns = [label_texts(samples[column]) == text for column, text in mapping.items()]
            rows = np.logical_and.reduce(columns)
            matching = getattr(entities, kind.attribute)[rows].dropna().unique()
            if not len(matching):
                problems.append(_no_match(mapping, kind, where, only_controls=bool(rows.any())))
            named.append((frozenset(mapping), frozenset(matching)))
        lists[parameter] = Listed(tuple(named))
    result = Lists(**lists)
    if in_both := set(result.combination.names) & set(result.validation_combination.names):
        problems.append(
            f"{data.source}: splits.combination and splits.validation_combination both list "
            f"{examples(sorted(in_both))}; hold out a pair once"
        )
    if problems:
        raise InputError(*problems)
    return result


def defining_columns(kind: ListedKind, data: Data) -> list[str]:
    """The columns whose values define an entity."""
    context, perturbation = data.context_columns, data.control and data.control.column
    columns = {
        "pair": (*context, perturbation),
        "condition": (*context, perturbation, *data.covariates.perturbation),
        "treated_context": context,
        "treated_level": (data.level_column,),
        "perturbation": (perturbation,),
        "study": (data.study_column,),
    }[kind.attribute]
    return [name for name in dict.fromkeys(columns) if name is not None]


def _mapping_problems(
    mapping: Mapping[str, str], samples: pd.DataFrame, data: Data, kind: ListedKind, where: str
) -> list[str]:
    """Columns that do not define the entities, and values that no sample has."""
    if data.control is None and kind.attribute not in ("treated_level", "study"):
        return [
            f"{where}: data.control is null, so no sample counts as treated; "
            f"declare the control, or list no {kind.plural}"
        ]
    columns, problems = defining_columns(kind, data), []
    if not columns and kind.attribute != "treated_context":
        return [f"{where}: {kind.home} is null; name the column, or list no {kind.plural}"]
    for column, value in mapping.items():
        if column not in columns:
            problems.append(
                f"{where}: {column} does not define {kind.plural}; expected columns of "
                f"{kind.home}{did_you_mean(column, columns)}"
            )
        elif value not in (texts := set(label_texts(samples[column]).dropna())):
            hint = did_you_mean(value, sorted(texts))
            problems.append(f"{where}: no sample has {column} = {value}{hint}")
    return problems


def _no_match(mapping: Mapping[str, str], kind: ListedKind, where: str, only_controls: bool) -> str:
    values = " and ".join(f"{column} = {value}" for column, value in mapping.items())
    subject = "only controls have" if only_controls else "no sample has"
    return f"{where}: {subject} {values}; {kind.advice}"


def _context_problems(
    entities: Entities, stays: pd.Series, names: list[str], source: str
) -> list[str]:
    """Listed contexts without a control in training."""
    with_controls = set(entities.context[stays & entities.control])
    return [
        f"{source}: splits.context: training has no control of the context {name}, and a new "
        "context is known by its controls alone; leave it out, or hold out some of its pairs by "
        "splits.combination"
        for name in names
        if name not in with_controls
    ]


def _no_treated_sample(
    entities: Entities, stays: pd.Series, lists: Lists, source: str
) -> list[str]:
    """A problem if lists of whole entities leave no treated sample for training."""
    wholes = [name for name in _WHOLE if getattr(lists, name).names]
    if not wholes or not entities.perturbation.notna().any():
        return []
    if entities.perturbation[stays].notna().any():
        return []
    keys = ", ".join(f"splits.{name}" for name in wholes)
    plurals = " or ".join(KINDS[name].plural for name in wholes)
    return [f"{source}: {keys}: no treated sample is left for training; hold out fewer {plurals}"]


def check_parts_in_training(
    entities: Entities, is_free: pd.Series, lists: Lists, source: str
) -> None:
    """InputError if no `is_free` sample (N,) outside the listed pairs and conditions has the
    context, or the perturbation, of a listed one; or none is a control of a listed context."""
    in_pairs = entities.pair.isin(lists.pairs)
    in_conditions = entities.condition.isin(lists.condition.names) & is_free
    stays = is_free & ~in_pairs & ~in_conditions
    problems = _context_problems(entities, stays, lists.context.names, source)
    problems += _no_treated_sample(entities, stays, lists, source)
    for rows, kind, noun, elsewhere in (
        (in_pairs, _PAIRS, "combination", "context"),
        (in_conditions, KINDS["condition"], "condition", "condition"),
    ):
        entity, known_context = getattr(entities, kind.attribute), entities.known_context
        no_context = set(known_context[rows].dropna()) - set(known_context[stays].dropna())
        for part, names, lacking, missing in (
            ("context", known_context, no_context, "neither a control nor another perturbation"),
            (
                "perturbation",
                entities.perturbation,
                entities.perturbations_lacking(rows, stays),
                f"no other {elsewhere}",
            ),
        ):
            for name in sorted(lacking):
                held_out = entity[rows & (names == name)].unique()
                problems.append(
                    f"{source}: splits: with {examples(held_out)} held out, training has {missing} "
                    f"of the {part} {name}; a {noun} needs both parts in training: "
                    f"hold out fewer {kind.plural}"
                )
    if problems:
        raise InputError(*problems)
