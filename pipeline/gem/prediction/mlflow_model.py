"""A trained model in the form that MLflow loads and serves.

MLflow imports this module by name from the code that is packed with the model, together with all
modules that it imports. N rows, G genes.
"""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.data.tables import LATENT_COLUMNS, identifier_series
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction.api import GEM
from pipeline.gem.prediction.predictor import Request
from pipeline.gem.prediction.query_table import (
    REFERENCE_COUNTS,
    REFERENCE_ID,
    SAMPLE_ID,
    known_columns,
)


def _load_pyfunc(path: str) -> "PredictionModel":
    """The entry point of MLflow; `path` is the model file."""
    return PredictionModel(GEM.load(path))


class PredictionModel:
    """`GEM.predict` behind the interface of `mlflow.pyfunc`."""

    def __init__(self, gem: GEM):
        self.gem = gem

    def predict(
        self, query: pd.DataFrame, params: Mapping[str, object] | None = None
    ) -> pd.DataFrame:
        """The table of `GEM.predict`, with `params` as its options.

        MlflowException if the query is not valid: a server answers with status 400.
        """
        options = dict(params or {})
        if "conditioning" in options:
            options["conditioning"] = tuple(map(str, options["conditioning"]))
        try:
            query = _with_text_names(query)
            if REFERENCE_COUNTS not in query:
                return self.gem.predict(query, **options)
            counts = self._reference(query[REFERENCE_COUNTS])
            query = query.drop(columns=REFERENCE_COUNTS).assign(**{REFERENCE_ID: counts.index})
            predictions = self.gem.predict(query, reference=counts, **options)
            return predictions.drop(columns=REFERENCE_ID)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _reference(self, cells: pd.Series) -> pd.DataFrame:
        """(N, G) raw counts; the index is the number of the row, as text."""
        genes, where = self.gem.genes, f"query: {REFERENCE_COUNTS}"
        bad = [
            row
            for row, counts in enumerate(cells)
            if not isinstance(counts, (list, np.ndarray)) or len(counts) != len(genes)
        ]
        if bad:
            raise InputError(
                f"{where}, rows {examples(bad)}: expected a list of {len(genes):,} raw counts, "
                "in the order of the model's genes"
            )
        try:
            counts = np.array(list(cells), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}; expected raw counts") from None
        return pd.DataFrame(counts, index=[str(row) for row in range(len(counts))], columns=genes)


def _with_text_names(query: pd.DataFrame) -> pd.DataFrame:
    """The names of samples as text where pandas read integers of JSON as floats."""
    names = [name for name in (SAMPLE_ID, REFERENCE_ID) if name in query]
    for name in (name for name in names if pd.api.types.is_float_dtype(query[name])):
        if (query[name].abs() >= 2**53).any():
            raise InputError(f"query: {name}: a number too long to be read exactly; write texts")
        query = query.assign(**{name: identifier_series(query[name])})
    return query


def inputs(gem: TrainedGEM) -> list[str]:
    """Columns that a query may have. All are optional."""
    return [*known_columns(gem), SAMPLE_ID, REFERENCE_COUNTS]


def outputs(gem: TrainedGEM) -> dict[str, type | None]:
    """Columns of the predictions in their order, and their types; None for an optional column."""
    optional = dict.fromkeys((*known_columns(gem), SAMPLE_ID))
    added = dict.fromkeys(("draw", *LATENT_COLUMNS, "low", "high"))
    return optional | {"extrapolated": bool} | added | {str(gene): int for gene in gem.genes}


def parameters() -> dict[str, object]:
    """Names and defaults of the params of a request: the fields of a Request, tuples as lists."""
    defaults = {option.name: option.default for option in fields(Request)}
    return defaults | {"conditioning": list(defaults["conditioning"])}
