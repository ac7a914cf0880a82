"""The random effects of the mixed model: products of factors of the metadata, as sparse columns.

A factor is the levels of a covariate, the features of its labels, a smooth basis of its numbers, or
whether a sample is treated. A term is a product of factors, such as context x treatment x time. Its
columns are those that training has.

N rows of metadata, D columns of all terms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.sparse import csr_array, hstack

from pipeline.gem.common.config import GROUPS, Control, Data, Numeric
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.encoder import FieldColumns, MetadataEncoder, field_columns

# Of the smooth basis: the kernel is the mean of two Gaussians, in deviations of the knots.
LENGTH_SCALES = (0.5, 2.0)
LARGEST_BASIS = 12  # knots
_JITTER = 1e-6
MAX_SIMILAR = 64  # contexts whose similarity is used
ROWS = 2**14  # whose design is in memory together
MAX_COLUMNS, MAX_VALUES = 2048, 2**24  # of the coefficients; the most frequent columns are kept

Kind = Literal["levels", "features", "smooth", "treatment", "treated", "similarity"]


@dataclass(frozen=True)
class Factor:
    """`treatment` is the levels of the control's column without the control, `treated` is 1 for all
    samples but controls, `similarity` has the similarity of contexts as inner products; it belongs
    to the first of the context columns."""

    kind: Kind
    covariate: str


@dataclass(frozen=True)
class Term:
    """A product of factors, and its columns in training: positions in the whole product, sorted."""

    factors: tuple[Factor, ...]
    columns: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        parts = [
            factor.covariate
            if factor.kind in ("levels", "treatment")
            else "treated"
            if factor.kind == "treated"
            else f"{factor.kind} {factor.covariate}"
            for factor in self.factors
        ]
        return " x ".join(parts)


@dataclass(frozen=True)
class ContextFeatures:
    """Features of contexts, whose inner products are their similarity: (1 + r) / 2, with r the
    correlation over genes of the mean controls, relative to the mean of all contexts."""

    columns: tuple[str, ...]  # that name a context
    contexts: tuple[int, ...] = ()  # positions in the product of their levels; sorted
    features: tuple[tuple[float, ...], ...] = ()  # of each; empty with two contexts, or many

    @classmethod
    def of(
        cls, columns: tuple[str, ...], context: csr_array, controls: np.ndarray
    ) -> "ContextFeatures":
        """From the context (R, contexts) of controls with expression (R, G)."""
        names, place = np.unique(context.indices, return_inverse=True)
        if not 3 <= len(names) <= MAX_SIMILAR:
            return cls(columns)
        row = np.repeat(np.arange(len(controls)), np.diff(context.indptr))
        profiles = np.zeros((len(names), controls.shape[1]))
        np.add.at(profiles, place, controls[row])
        profiles /= np.bincount(place)[:, None]
        profiles -= profiles.mean(axis=0)
        profiles /= np.linalg.norm(profiles, axis=1, keepdims=True).clip(1e-12)
        values, vectors = np.linalg.eigh((1 + profiles @ profiles.T) / 2)
        kept = values > _JITTER
        features = vectors[:, kept] * np.sqrt(values[kept])
        return cls(columns, tuple(names.tolist()), tuple(map(tuple, features.tolist())))

    def matrix(self, context: csr_array) -> csr_array:
        """(N, features) of rows with these contexts (N, contexts)"""
        known = _select(context, self.contexts)
        return csr_array(known @ csr_array(np.array(self.features, dtype=np.float32)))

    def problems(self, levels: Mapping[str, int]) -> list[str]:
        """What contradicts covariates with these numbers of levels."""
        if not self.features and not self.contexts:
            return []
        sizes = [levels.get(name, 0) for name in self.columns]
        if not sizes or not all(sizes):
            return ["features of contexts whose columns have no levels"]
        places = list(self.contexts)
        if places != sorted(set(places)) or places[0] < 0 or places[-1] >= math.prod(sizes):
            return ["contexts that are repeated, not sorted or not those of their columns"]
        widths = {len(row) for row in self.features}
        if len(self.features) != len(places) or len(widths) != 1 or widths == {0}:
            return ["features that are not one row for each context"]
        if not np.isfinite(self.features).all():
            return ["features of contexts that are not finite"]
        return []


@dataclass(frozen=True)
class Design:
    """The terms of a mixed model, and what their factors are computed from."""

    terms: tuple[Term, ...]
    control: Control | None
    knots: Mapping[str, tuple[float, ...]]  # of the smooth basis, by numeric covariate; sorted
    contexts: ContextFeatures

    @classmethod
    def of(
        cls,
        encoder: MetadataEncoder,
        data: Data,
        rows: csr_array,
        measured: tuple[csr_array, np.ndarray] | None = None,
    ) -> "Design":
        """All terms that the declarations allow, for training rows (N, C). `measured`: rows (R, C)
        with their expression (R, G), for the similarity of contexts."""
        control = (
            data.control if data.control and _has_field(encoder, data.control.column) else None
        )
        knots = {}
        for part, start in _fields(encoder):
            if isinstance(part.field.covariate, Numeric) and part.field.levels:
                value, present = start + part.own.start, rows[:, [start + part.own.start + 1]]
                numbers = np.unique(rows[:, [value]].toarray()[present.toarray() > 0])
                places = np.linspace(0, len(numbers) - 1, min(len(numbers), LARGEST_BASIS))
                knots[part.field.name] = tuple(numbers[places.round().astype(int)].tolist())
        columns = _context_columns(encoder, data)
        design = cls((), control, knots, ContextFeatures(columns))
        if measured is not None and control is not None and columns:
            design = design._with_similarities(encoder, *measured)
        alike = Factor("similarity", columns[0]) if design.contexts.features else None
        terms = tuple(map(Term, _products(encoder, columns, control, alike)))
        return replace(design, terms=terms)

    def _with_similarities(
        self, encoder: MetadataEncoder, rows: csr_array, expression: np.ndarray
    ) -> "Design":
        controls = np.flatnonzero(~self.treated(encoder, rows))
        context = self._context(encoder, rows[controls])
        features = ContextFeatures.of(self.contexts.columns, context, expression[controls])
        return replace(self, contexts=features)

    def with_columns(self, encoder: MetadataEncoder, rows: csr_array, genes: int) -> "Design":
        """With the columns that training rows (N, C) have, as many as memory allows: of the terms
        in their order, the most frequent ones."""
        left, terms = min(MAX_COLUMNS, MAX_VALUES // genes), []
        for term, (columns, numbers) in zip(
            self.terms, self._column_counts(encoder, rows), strict=True
        ):
            kept = np.sort(np.argsort(-numbers, kind="stable")[:left])
            left -= len(kept)
            if len(kept):
                terms.append(replace(term, columns=tuple(columns[kept].tolist())))
        return replace(self, terms=tuple(terms))

    def _column_counts(
        self, encoder: MetadataEncoder, rows: csr_array
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(columns that rows (N, C) have, number of their rows) of each term."""
        counts = [(np.empty(0, np.int64), np.empty(0, np.int64)) for _ in self.terms]
        for start in range(0, rows.shape[0], ROWS):
            matrices = self._factor_matrices(encoder, rows[start : start + ROWS])
            for position, term in enumerate(self.terms):
                product = _product([matrices[factor] for factor in term.factors])
                more = np.unique(product.indices, return_counts=True)
                columns, numbers = map(np.concatenate, zip(counts[position], more, strict=True))
                columns, index = np.unique(columns, return_inverse=True)
                counts[position] = columns, np.bincount(index, numbers).astype(np.int64)
        return counts

    @property
    def width(self) -> int:
        return sum(len(term.columns) for term in self.terms)

    def treated(self, encoder: MetadataEncoder, rows: csr_array) -> np.ndarray:
        """(N,) whether a row is no control; without a declared control none is."""
        if self.control is None:
            return np.zeros(rows.shape[0], dtype=bool)
        factor = Factor("treated", self.control.column)
        return np.diff(self._matrix_of(factor, encoder, rows).indptr) > 0

    def matrices(self, encoder: MetadataEncoder, rows: csr_array) -> list[csr_array]:
        """The columns of each term, for rows (N, C) of all groups side by side."""
        factors = self._factor_matrices(encoder, rows)
        return [
            _select(_product([factors[factor] for factor in term.factors]), term.columns)
            for term in self.terms
        ]

    def matrix(self, encoder: MetadataEncoder, rows: csr_array) -> csr_array:
        """(N, D) float32"""
        parts = self.matrices(encoder, rows)
        empty = csr_array((rows.shape[0], 0), dtype=np.float32)
        return csr_array(hstack([empty, *parts], format="csr", dtype=np.float32))

    def problems(self, widths: Mapping[str, Mapping[str, int]]) -> list[str]:
        """What contradicts the covariates, whose factors have these numbers of columns by kind."""
        problems, widths = [], {name: dict(of_field) for name, of_field in widths.items()}
        for name, knots in self.knots.items():
            if not widths.get(name, {}).get("smooth"):
                problems.append(f"knots of {name}, which is no number")
            elif not knots or list(knots) != sorted(set(knots)):
                problems.append(f"knots of {name} are absent, repeated or not sorted")
            else:
                widths[name]["smooth"] = len(knots)
        levels = {name: of_field.get("levels", 0) for name, of_field in widths.items()}
        if wrong := self.contexts.problems(levels):
            return problems + wrong
        if self.contexts.features:
            widths[self.contexts.columns[0]]["similarity"] = len(self.contexts.features[0])
        for term in self.terms:
            sizes = [widths.get(f.covariate, {}).get(f.kind, 0) for f in term.factors]
            columns = term.columns
            if not sizes or not all(sizes):
                problems.append(f"the term {term.name} has factors that the covariates lack")
            elif not columns or list(columns) != sorted(set(columns)):
                problems.append(f"the columns of {term.name} are absent, repeated or not sorted")
            elif columns[0] < 0 or columns[-1] >= math.prod(sizes):
                problems.append(f"the columns of {term.name} are not those of its factors")
        return problems

    def _factor_matrices(
        self, encoder: MetadataEncoder, rows: csr_array
    ) -> dict[Factor, csr_array]:
        used = dict.fromkeys(factor for term in self.terms for factor in term.factors)
        return {factor: self._matrix_of(factor, encoder, rows) for factor in used}

    def _matrix_of(self, factor: Factor, encoder: MetadataEncoder, rows: csr_array) -> csr_array:
        """(N, columns of the factor)"""
        if factor.kind == "similarity":
            return self.contexts.matrix(self._context(encoder, rows))
        places = {part.field.name: (part, start) for part, start in _fields(encoder)}
        return self._factor_matrix(factor, *places[factor.covariate], rows)

    def _context(self, encoder: MetadataEncoder, rows: csr_array) -> csr_array:
        """(N, all contexts) the context of each row"""
        factors = [Factor("levels", name) for name in self.contexts.columns]
        return _product([self._matrix_of(factor, encoder, rows) for factor in factors])

    def _factor_matrix(
        self, factor: Factor, part: FieldColumns, start: int, rows: csr_array
    ) -> csr_array:
        """(N, columns of the factor)"""
        field = part.field
        first = start + part.own.start
        levels = rows[:, first + field.first_level : first + field.first_features]
        if factor.kind == "levels":
            return levels
        if factor.kind == "smooth":
            values = rows[:, [first]].toarray().ravel()
            present = np.flatnonzero(np.diff(levels.indptr))
            return self._smooth(self.knots[field.name], values, present)
        labels = rows[:, start + part.features.start : start + part.features.stop]
        if factor.kind == "features":
            return csr_array(labels @ csr_array(field.features.values))
        is_control = np.array([level == self.control.value for level in field.levels])
        treated = levels[:, ~is_control]
        if factor.kind == "treatment":
            return treated
        controls = levels[:, is_control].sum(axis=1) > 0
        only = controls & (np.diff(treated.indptr) == 0)
        return csr_array((~only).astype(np.float32)[:, None])

    @staticmethod
    def _smooth(knots: Sequence[float], values: np.ndarray, present: np.ndarray) -> csr_array:
        """(N, knots) whose inner products are the kernel of the present values (Nystroem).

        Distances count knots, whatever the scale: doses and times are chosen so that much happens
        between neighbours. Beyond the last knot nothing changes.
        """
        place = np.arange(len(knots)) - (len(knots) - 1) / 2
        place /= place.std() or 1.0
        root = np.linalg.cholesky(_kernel(place, place) + _JITTER * np.eye(len(place)))
        of_values = np.interp(values[present], knots, place)
        dense = np.zeros((len(values), len(place)), dtype=np.float32)
        dense[present] = np.linalg.solve(root, _kernel(place, of_values)).T
        return csr_array(dense)


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squares = (left[:, None] - right) ** 2
    return sum(np.exp(-0.5 * squares / scale**2) for scale in LENGTH_SCALES) / len(LENGTH_SCALES)


def _fields(encoder: MetadataEncoder) -> list[tuple[FieldColumns, int]]:
    """(the columns of each covariate, where its group starts among all columns)."""
    fields, start = [], 0
    for group in GROUPS:
        parts = field_columns(encoder.groups[group])
        fields += [(part, start) for part in parts]
        start += parts[-1].features.stop if parts else 0
    return fields


def _has_field(encoder: MetadataEncoder, name: str) -> bool:
    return any(part.field.name == name for part, _ in _fields(encoder))


def _context_columns(encoder: MetadataEncoder, data: Data) -> tuple[str, ...]:
    """The covariates that name a context; none if one of them is a number."""
    fields = [field for field in encoder.fields if field.name in data.context_columns]
    if any(isinstance(field.covariate, Numeric) or not field.levels for field in fields):
        return ()
    return tuple(field.name for field in fields)


def _products(
    encoder: MetadataEncoder,
    context_columns: tuple[str, ...],
    control: Control | None,
    alike: Factor | None,
) -> list[tuple[Factor, ...]]:
    """The factors of every term: each covariate alone; then treatment, its features, dose and time
    with one another, with the context, and with what it resembles (`alike`)."""
    alone: list[tuple[Factor, ...]] = []
    treatments: list[Factor] = []
    numbers: list[Factor] = []
    for group in GROUPS:
        for field in encoder.groups[group]:
            mine = _factors_of(field, control)
            if isinstance(field.covariate, Numeric):
                numbers += mine if group == "perturbation" else []
            elif control is not None and field.name == control.column:
                treatments += mine
            alone += [(factor,) for factor in mine]
    products = [(treatment, number) for treatment in treatments for number in numbers]
    if len(numbers) > 1:
        products += [(treatment, *numbers) for treatment in treatments]
    inner = [*((number,) for number in numbers), *((one,) for one in treatments), *products]
    if context := tuple(Factor("levels", name) for name in context_columns):
        products += [(*context, *factors) for factors in inner]
        products += [context] if len(context) > 1 else []
    if alike is not None:
        products += [(alike, *factors) for factors in inner if factors[0] in treatments]
    return alone + products


def _factors_of(field: CovariateEncoder, control: Control | None) -> list[Factor]:
    """The factors of one covariate."""
    if isinstance(field.covariate, Numeric):
        return [Factor("smooth", field.name)] if field.levels else []
    factors = []
    if control is not None and field.name == control.column:
        factors = [Factor("treated", field.name), Factor("treatment", field.name)]
    elif field.levels:
        factors = [Factor("levels", field.name)]
    return factors + ([Factor("features", field.name)] if field.features is not None else [])


def _product(factors: Sequence[csr_array]) -> csr_array:
    """(N, product of the widths): in each row, the products of an entry of every factor."""
    result = factors[0]
    for factor in factors[1:]:
        result = _row_products(result, factor)
    return result


def _row_products(left: csr_array, right: csr_array) -> csr_array:
    sizes = np.diff(left.indptr).astype(np.int64), np.diff(right.indptr).astype(np.int64)
    numbers = sizes[0] * sizes[1]
    offsets = np.concatenate([[0], np.cumsum(numbers)])
    row = np.repeat(np.arange(len(numbers)), numbers)
    within = np.arange(offsets[-1]) - offsets[row]
    first = left.indptr[row] + within // sizes[1][row]
    second = right.indptr[row] + within % sizes[1][row]
    width = left.shape[1] * right.shape[1]
    columns = left.indices[first].astype(np.int64) * right.shape[1] + right.indices[second]
    values = left.data[first] * right.data[second]
    return csr_array((values, columns, offsets), shape=(len(numbers), width))


def _select(matrix: csr_array, columns: Sequence[int]) -> csr_array:
    """(N, columns) float32"""
    kept = np.asarray(columns, dtype=np.int64)
    places = np.searchsorted(kept, matrix.indices)
    inside = kept[np.minimum(places, len(kept) - 1)] == matrix.indices
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))[inside]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=matrix.shape[0]))])
    values = matrix.data[inside].astype(np.float32)
    return csr_array((values, places[inside], offsets), shape=(matrix.shape[0], len(kept)))
