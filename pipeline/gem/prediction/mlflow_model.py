"""A trained model as MLflow loads and serves it: a table of experiments in, the table of GEM.predict out.

MLflow imports this module by its name from the code that was logged beside the model; all that it imports goes along.
N rows, G genes.
"""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.prediction.api import predict
from pipeline.gem.prediction.predictor import Request
from pipeline.gem.prediction.query_table import REFERENCE, SAMPLE, known_columns

REFERENCE_COUNTS = (
    "reference_counts"  # of a query: a list of raw counts a row, in the order of the genes
)


def _load_pyfunc(path: str) -> "Served":
    """MLflow's way in; `path` is the model file."""
    return Served(TrainedGEM.load(path))


class Served:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, gem: TrainedGEM):
        self.gem = gem

    def predict(
        self, query: pd.DataFrame, params: Mapping[str, object] | None = None
    ) -> pd.DataFrame:
        """As GEM.predict; `params` by the names of `parameters`. A bad query is MLflow's error, which a server answers with 400."""
        how = dict(params or {})
        if "conditioning" in how:
            how["conditioning"] = tuple(map(str, how["conditioning"]))
        try:
            if REFERENCE_COUNTS not in query:
                return predict(self.gem, query, None, how)
            counts = self._counts(query[REFERENCE_COUNTS])
            named = query.drop(columns=REFERENCE_COUNTS).assign(**{REFERENCE: counts.index})
            return predict(self.gem, named, counts, how).drop(columns=REFERENCE)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _counts(self, lists: pd.Series) -> pd.DataFrame:
        """(N, G) raw counts, rows named by their number."""
        wanted = len(self.gem.genes)
        bad = [
            row
            for row, counts in enumerate(lists)
            if not isinstance(counts, (list, np.ndarray)) or len(counts) != wanted
        ]
        if bad:
            raise InputError(
                f"query: {REFERENCE_COUNTS}, rows {examples(bad)}: expected a list of {wanted:,} raw counts, in the order of the model's genes"
            )
        try:
            counts = np.array(list(lists), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"query: {REFERENCE_COUNTS}: {error}; expected raw counts") from None
        return pd.DataFrame(
            counts, index=[str(row) for row in range(len(counts))], columns=self.gem.genes
        )


def inputs(gem: TrainedGEM) -> list[str]:
    """Columns that a query may have, every one of them optional."""
    return [*known_columns(gem), SAMPLE, REFERENCE_COUNTS]


def outputs(gem: TrainedGEM) -> dict[str, type | None]:
    """Columns of an answer in their order, with the type of a cell; None where a column depends on what is asked."""
    asked = [*known_columns(gem), SAMPLE]
    further = ["sample", *(f"latent_{group}" for group in GROUPS), "low", "high"]
    return (
        dict.fromkeys(asked)
        | {"extrapolated": bool}
        | dict.fromkeys(further)
        | {str(gene): int for gene in gem.genes}
    )


def parameters() -> dict[str, object]:
    """Names and defaults of what else one may ask for: those of a Request, lists for tuples."""
    return {
        one.name: list(one.default) if isinstance(one.default, tuple) else one.default
        for one in fields(Request)
    }
