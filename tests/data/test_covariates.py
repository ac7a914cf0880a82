"""Embedded labels as the model sees them: [standardised features | identity], several labels summed, none missing silently."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.generation import generate

from pipeline.gem.common.config import Covariates, Embedding
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

EMBEDDING = {"kind": "embedding", "table": "drugs.parquet"}
# Seen: a and b, so that the features are standardised with means 2 and 0, deviations 2 and 1. Only seen as a name: bare.
FEATURES = FeatureTable(("a", "b", "unseen"), np.array([[0, -1], [4, 1], [6, 2]], dtype=np.float32))
TRAINING = ["a", "b", "control", "a|b", "bare", None]
LEVELS = ("a", "b", "bare", "control")


@pytest.fixture
def encoder() -> MetadataEncoder:
    covariates = Covariates.model_validate(
        {"technical": {}, "biological": {}, "perturbation": {"drug": EMBEDDING}}
    )
    return MetadataEncoder.fit(pd.DataFrame({"drug": TRAINING}), covariates, {"drug": FEATURES})


def encoded(encoder: MetadataEncoder, *values, unknown: str = "refuse") -> list:
    return encoder.encode(pd.DataFrame({"drug": pd.Series(values, dtype=object)}), unknown)[
        "perturbation"
    ].tolist()


def test_a_seen_label_is_its_features_and_its_identity(encoder):
    assert encoded(encoder, "a", "b") == [[-1, -1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]


def test_a_label_never_seen_is_its_features_alone(encoder):
    assert encoded(encoder, "unseen") == [[2, 2, 0, 0, 0, 0]]


def test_a_label_without_features_is_its_identity_alone(encoder):
    assert encoded(encoder, "control", "bare") == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]


def test_several_labels_sum_their_features_and_share_their_identities(encoder):
    assert encoded(encoder, "a|b", " unseen | a", "b|b", "bare|unseen") == [
        [0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [2, 2, 0, 0, 1, 0],
    ]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", "  "])
def test_a_missing_label_encodes_as_zeros(encoder, missing):
    assert encoded(encoder, missing) == [[0] * 6]


@pytest.mark.parametrize(
    ("value", "close"),
    [
        ("unsen", "did you mean unseen?"),
        ("a|contrl", "did you mean control?"),
        ("barre", "did you mean bare?"),
        ("zzzz", "known: a, b, bare, control, unseen"),
    ],
)
def test_a_label_in_neither_table_nor_training_is_refused_with_what_is_known(encoder, value, close):
    with pytest.raises(InputError) as caught:
        encoded(encoder, "a", value)
    (problem,) = caught.value.problems
    assert (
        problem.startswith(f"drug, row 1: '{value}' was never seen in training; ")
        and close in problem
    )
    assert encoded(encoder, value, unknown="missing") == [[0] * 6]


def test_the_blocks_tell_features_from_identities(encoder):
    assert encoder.blocks("perturbation") == [(2, 4)]
    assert encoder.sizes == {"technical": 0, "biological": 0, "perturbation": 6}


def test_blocks_of_other_kinds_are_whole_fields():
    covariates = Covariates.model_validate(
        {
            "technical": {},
            "biological": {
                "age": {"kind": "numeric", "scale": "linear"},
                "sex": {"kind": "categorical"},
            },
            "perturbation": {"drug": EMBEDDING},
        }
    )
    samples = pd.DataFrame({"age": [1.0, 2.0], "sex": ["f", "m"], "drug": ["a", "b"]})
    encoder = MetadataEncoder.fit(samples, covariates, {"drug": FEATURES})
    assert encoder.blocks("biological") == [(2, 0), (2, 0)] and encoder.blocks("perturbation") == [
        (2, 2)
    ]
    for group, matrix in encoder.encode(samples).items():
        assert sum(sum(block) for block in encoder.blocks(group)) == matrix.shape[1]


def test_features_are_standardised_over_labels_however_many_samples_have_them():
    covariate = Embedding.model_validate(EMBEDDING)
    one, other = (
        CovariateEncoder.learn("drug", covariate, pd.Series(column), FEATURES)
        for column in (["a", "b"], ["a"] * 9 + ["b"])
    )
    assert np.array_equal(one.features.values, other.features.values)


def test_an_embedding_has_a_classifier_of_single_labels(encoder):
    assert [field.name for field in encoder.heads()] == ["drug"] and encoder.heads()[
        0
    ].levels == LEVELS
    query = pd.DataFrame({"drug": ["b", "control", "a|b", "unseen", None]})
    assert encoder.labels(query)["drug"].tolist() == [1, 3, -1, -1, -1]


def test_without_features_an_embedding_is_a_multilabel():
    """What the baselines that know identities alone are given."""
    identities = Covariates.model_validate(
        {"technical": {}, "biological": {}, "perturbation": {"drug": EMBEDDING}}
    ).identities()
    encoder = MetadataEncoder.fit(pd.DataFrame({"drug": TRAINING}), identities)
    assert encoded(encoder, "a|b", "control", None) == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    with pytest.raises(InputError, match="unseen"):
        encoded(encoder, "unseen")


def test_numbers_that_name_labels_find_their_features():
    features = FeatureTable(("1", "2", "3"), np.array([[0.0], [2.0], [4.0]], dtype=np.float32))
    covariates = Covariates.model_validate(
        {"technical": {}, "biological": {}, "perturbation": {"drug": EMBEDDING}}
    )
    encoder = MetadataEncoder.fit(
        pd.DataFrame({"drug": [1.0, 2.0, np.nan]}), covariates, {"drug": features}
    )
    assert encoder.encode(pd.DataFrame({"drug": [3, 1]}))["perturbation"].tolist() == [
        [3, 0, 0],
        [-1, 1, 0],
    ]


# state


def test_the_state_restores_the_same_encoding(encoder):
    again = MetadataEncoder.from_state(encoder.state())
    values = ["a", "unseen", "a|b", "control", None]
    assert encoded(again, *values) == encoded(encoder, *values)
    assert again.blocks("perturbation") == encoder.blocks("perturbation")
    assert (
        again.groups["perturbation"][0].known
        == encoder.groups["perturbation"][0].known
        == (*LEVELS, "unseen")
    )


def test_a_model_file_keeps_the_features_and_loads_without_pickle(cohort, params, tmp_path):
    """`weights_only=True` loads tensors and plain values: the features must be such."""
    gem = fit(
        TrainingData.load(cohort, torch.device("cpu")), params.override({"train.epochs": 1}), seed=1
    ).gem
    gem.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    (state,) = (
        state for state in content["metadata"]["perturbation"] if state["name"] == "perturbation"
    )
    assert isinstance(state["features"]["values"], torch.Tensor)
    again = TrainedGEM.load(tmp_path)
    assert again.to_bytes() == gem.to_bytes()
    query = cohort.rows(["test_perturbation"])
    assert not set(query["perturbation"]) & set(state["levels"]), (
        "a perturbation never seen is its features alone"
    )
    said = generate(gem, query, unknown="missing")
    assert np.array_equal(generate(again, query, unknown="missing"), said)
    assert not np.array_equal(
        generate(gem, query.assign(perturbation=None), unknown="missing"), said
    )
    with pytest.raises(InputError, match="nobody knows"):
        generate(again, query.assign(perturbation="nobody knows"))
