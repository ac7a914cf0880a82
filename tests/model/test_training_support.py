"""Extrapolation: rows whose combination of values no training sample has."""

import pandas as pd
import pytest

from pipeline.gem.common.config import Control, Covariates, Data
from pipeline.gem.model.training_support import TrainingSupport

TRAINING = pd.DataFrame(
    {
        "tissue": ["liver", "liver", "lung", None],
        "drug": ["a", "a|b", "control", "c"],
    }
)


@pytest.fixture
def support(dosed: Data) -> TrainingSupport:
    kinds = {"tissue": {"kind": "categorical"}, "drug": {"kind": "multilabel"}}
    covariates = Covariates.model_validate(
        {"technical": {}, "biological": kinds, "perturbation": {}}
    )
    control = Control(column="drug", value="control")
    data = dosed.model_copy(update={"covariates": covariates, "control": control})
    return TrainingSupport.from_samples(TRAINING, data)


@pytest.mark.parametrize(
    ("tissue", "drug", "extrapolated"),
    [
        ("liver", "a", False),
        ("liver", "a|b", False),
        ("lung", "a", True),
        ("liver", None, False),  # a missing value matches any
        (None, "c", False),
        (None, "d", True),
        ("liver", "c", True),  # a missing training value matches missing values only
        (None, None, False),
    ],
)
def test_a_row_is_extrapolated_if_no_training_sample_has_its_values(
    support, tissue, drug, extrapolated
):
    rows = pd.DataFrame({"tissue": ["liver", tissue], "drug": ["a", drug]}, dtype=object)
    assert support.is_extrapolated(rows).tolist() == [False, extrapolated]


def test_an_absent_column_is_missing(support):
    assert support.is_extrapolated(TRAINING[["tissue"]]).tolist() == [False] * 4


def test_without_columns_nothing_is_extrapolated():
    assert TrainingSupport().is_extrapolated(TRAINING).tolist() == [False] * 4
