"""The model that MLflow serves."""

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from pipeline.gem.prediction.mlflow_model import PredictionModel, inputs, outputs, parameters


@pytest.fixture(scope="module")
def model(gem) -> PredictionModel:
    return PredictionModel(gem)


@pytest.mark.parametrize("options", [None, {"mode": "sample", "draws": 2, "seed": 7}])
def test_predictions_are_those_of_the_api(model, gem, query, options):
    expected = gem.predict(query, **(options or {}))
    pd.testing.assert_frame_equal(model.predict(query, options), expected)


def test_reference_counts_of_a_row_are_its_reference(model, gem, query, reference):
    lists = query.head(5).assign(reference_counts=reference.to_numpy().tolist())
    named = query.head(5).assign(reference_id=reference.index)
    predictions = model.predict(lists, {"conditioning": np.array(["biological"])})
    expected = gem.predict(named, reference=reference, conditioning=("biological",))
    pd.testing.assert_frame_equal(predictions, expected.drop(columns="reference_id"))


def test_names_that_json_made_floats_are_texts_again(model, query, reference):
    names = {"sample_id": [1, None, 3], "reference_id": [2.0, 0.0, np.nan]}
    rows = query.head(3).assign(**names)
    assert model.predict(rows.drop(columns="reference_id"))["sample_id"].tolist() == [
        "1",
        None,
        "3",
    ]
    predictions = model.gem.predict(
        rows.head(2), reference=reference.set_axis([0.0, 1.0, 2.0, 3.0, 4.0])
    )
    expected = model.gem.predict(
        rows.head(2).assign(reference_id=reference.index[[2, 0]]), reference=reference
    )
    np.testing.assert_array_equal(predictions[model.gem.genes], expected[model.gem.genes])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"tissue": "tissue_l"}, {}, "did you mean tissue_"),
        ({"sample_id": 2.0**53}, {}, "sample_id: a number too long to be read exactly"),
        ({}, {"mode": "sampel"}, "mode: 'sampel' is unknown; did you mean"),
        ({"reference_counts": [[1, 2]]}, {}, "reference_counts, rows 0: expected a list of"),
        ({"reference_counts": 7}, {}, "reference_counts, rows 0: expected a list of"),
    ],
)
def test_an_invalid_query_is_a_client_error(model, query, change, options, message):
    with pytest.raises(MlflowException, match=message) as caught:
        model.predict(query.head(1).assign(**change), options)
    assert caught.value.get_http_status_code() == 400


def test_the_signature_has_the_columns_and_options_of_predictions(gem, query):
    columns = outputs(gem)
    for options in ({}, {"latents": True, "interval": True}, {"mode": "sample", "draws": 2}):
        predictions = gem.predict(query.drop(columns="remark").head(2), **options)
        assert set(predictions) <= set(columns)
        assert {name for name, kind in columns.items() if kind} <= set(predictions)
    assert set(query.columns) - {"remark"} <= set(inputs(gem))
    assert parameters()["conditioning"] == ["technical", "biological"]
    gem.predict(query, **parameters())
