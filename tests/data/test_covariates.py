"""Embedding covariates, encoded as [standardised features | identity], and dependencies."""

import numpy as np
import pandas as pd
import pytest
from support.encoding import dense

from pipeline.gem.common.config import Covariates, Embedding
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.covariates import CovariateEncoder, FunctionalDependency
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.features import FeatureTable

EMBEDDING = {"kind": "embedding", "table": "drugs.parquet"}
DRUG = Covariates.model_validate(
    {"technical": {}, "biological": {}, "perturbation": {"drug": EMBEDDING}}
)
# The training labels a and b standardise the features: means 2 and 0, deviations 2 and 1.
FEATURES = FeatureTable(("a", "b", "unseen"), np.array([[0, -1], [4, 1], [6, 2]], dtype=np.float32))
TRAINING = ["a", "b", "control", "a|b", "bare", None]
LEVELS = ("a", "b", "bare", "control")


@pytest.fixture
def encoder() -> MetadataEncoder:
    return MetadataEncoder.fit(pd.DataFrame({"drug": TRAINING}), DRUG, {"drug": FEATURES})


def encode(encoder: MetadataEncoder, *values, unknown: str = "refuse") -> list:
    samples = pd.DataFrame({"drug": pd.Series(values, dtype=object)})
    return dense(encoder, samples, unknown)["perturbation"].tolist()


@pytest.mark.parametrize(
    ("value", "code"),
    {
        "a": [-1, -1, 1, 0, 0, 0],
        "b": [1, 1, 0, 1, 0, 0],
        "unseen": [2, 2, 0, 0, 0, 0],  # features alone
        "control": [0, 0, 0, 0, 0, 1],  # identity alone
        "bare": [0, 0, 0, 0, 1, 0],
        "a|b": [0, 0, 1, 1, 0, 0],
        " unseen | a": [1, 1, 1, 0, 0, 0],
        "b|b": [1, 1, 0, 1, 0, 0],
        "bare|unseen": [2, 2, 0, 0, 1, 0],
    }.items(),
)
def test_labels_are_the_sum_of_their_features_and_their_identities(encoder, value, code):
    assert encode(encoder, value) == [code]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", "  "])
def test_a_missing_label_encodes_as_zeros(encoder, missing):
    assert encode(encoder, missing) == [[0] * 6]


@pytest.mark.parametrize(
    ("value", "suggestion"),
    [
        ("unsen", "did you mean unseen?"),
        ("a|contrl", "did you mean control?"),
        ("barre", "did you mean bare?"),
        ("zzzz", "known: a, b, bare, control, unseen"),
    ],
)
def test_an_unknown_label_is_an_error_with_the_known_ones(encoder, value, suggestion):
    with pytest.raises(InputError) as caught:
        encode(encoder, "a", value)
    (problem,) = caught.value.problems
    start = f"drug, row 1: '{value}' was never seen in training; {suggestion}"
    assert problem.startswith(start)
    assert encode(encoder, value, unknown="missing") == [[0] * 6]


def test_the_features_of_a_label_are_one_entry_beside_its_identity(encoder):
    (part,) = encoder.columns("perturbation")
    assert (part.own, part.features) == (slice(0, 4), slice(4, 7))
    assert encoder.inputs == {"technical": 0, "biological": 0, "perturbation": 6}
    (row,) = encoder.encode(pd.DataFrame({"drug": ["a|b"]}))["perturbation"].distinct
    assert row.indices.tolist() == [0, 1, 4, 5] and row.data.tolist() == [1, 1, 1, 1]


def test_the_columns_of_features_follow_those_of_all_covariates():
    covariates = Covariates.model_validate(
        {
            "technical": {},
            "biological": {},
            "perturbation": {"drug": EMBEDDING, "type": CATEGORICAL, "other": EMBEDDING},
        }
    )
    samples = pd.DataFrame({"drug": ["a", "b"], "type": ["t", "u"], "other": ["b", "bare"]})
    features = {"drug": FEATURES, "other": FEATURES}
    encoder = MetadataEncoder.fit(samples, covariates, features)
    columns = encoder.columns("perturbation")
    owns = [(part.own.start, part.own.stop) for part in columns]
    assert owns == [(0, 2), (2, 4), (4, 6)]
    labels = [(part.features.start, part.features.stop) for part in columns]
    assert labels == [(6, 9), (9, 9), (9, 12)]
    rows = encoder.encode(samples)["perturbation"].matrix()
    assert [rows[[row]].indices.tolist() for row in (0, 1)] == [[0, 2, 4, 6, 10], [1, 3, 5, 7]]


def test_features_are_standardised_over_labels_and_not_over_samples():
    covariate = Embedding.model_validate(EMBEDDING)
    one, other = (
        CovariateEncoder.fit("drug", covariate, pd.Series(column), FEATURES)
        for column in (["a", "b"], ["a"] * 9 + ["b"])
    )
    assert np.array_equal(one.features.values, other.features.values)


def test_an_embedding_has_a_classifier_of_single_labels(encoder):
    (head,) = encoder.heads()
    assert (head.name, head.levels) == ("drug", LEVELS)
    query = pd.DataFrame({"drug": ["b", "control", "a|b", "unseen", None]})
    assert encoder.labels(query)["drug"].tolist() == [1, 3, -1, -1, -1]


def test_without_features_an_embedding_is_a_multilabel():
    encoder = MetadataEncoder.fit(pd.DataFrame({"drug": TRAINING}), DRUG.identities())
    assert encode(encoder, "a|b", "control", None) == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    with pytest.raises(InputError, match="unseen"):
        encode(encoder, "unseen")


def test_a_rare_label_is_reduced_to_its_features():
    covariate = Embedding.model_validate(EMBEDDING | {"min_count": 2})
    column = pd.Series(["a", "a", "b", "control", "control"])
    field = CovariateEncoder.fit("drug", covariate, column, FEATURES)
    assert field.levels == ("a", "control")
    assert field.encode_value("b") == {3: 1.0} and field.encode_value("a") == {0: 1.0, 2: 1.0}
    every = CovariateEncoder.fit("drug", Embedding.model_validate(EMBEDDING), column, FEATURES)
    assert np.array_equal(field.features.values, every.features.values)


def test_a_rare_label_determines_nothing():
    declared = {"kind": "categorical", "min_count": 2}
    covariates = {"technical": {"study": declared, "platform": {"kind": "categorical"}}}
    covariates |= {"biological": {}, "perturbation": {}}
    samples = pd.DataFrame(
        {"study": ["s1", "s1", "s2", "s2", "s3", "s3", "s4"], "platform": [*"aabbaab"]}
    )
    encoder = MetadataEncoder.fit(samples, Covariates.model_validate(covariates))
    (dependency,) = encoder.dependencies
    assert dependency.levels == {"s1": "a", "s2": "b", "s3": "a"}


def test_labels_that_are_numbers_have_features():
    features = FeatureTable(("1", "2", "3"), np.array([[0.0], [2.0], [4.0]], dtype=np.float32))
    samples = pd.DataFrame({"drug": [1.0, 2.0, np.nan]})
    encoder = MetadataEncoder.fit(samples, DRUG, {"drug": features})
    encoded = dense(encoder, pd.DataFrame({"drug": [3, 1]}))["perturbation"]
    assert encoded.tolist() == [[3, 0, 0], [-1, 1, 0]]


# functional dependencies

CATEGORICAL = {"kind": "categorical"}
DEPENDENT = Covariates.model_validate(
    {
        "technical": {
            "study": CATEGORICAL,
            "platform": CATEGORICAL,
            "date": {"kind": "numeric", "scale": "linear"},
        },
        "biological": {
            "tissue": CATEGORICAL,
            "cell_type": CATEGORICAL,
            "marks": {"kind": "multilabel"},
        },
        "perturbation": {},
    }
)
SAMPLES = pd.DataFrame(
    {
        "study": ["s1", "s1", "s2", "s3"],
        "platform": ["a", "a", "a", "b"],
        "date": [1, 1, 2, 3],
        "tissue": ["liver", "liver", "brain", None],
        "cell_type": ["kupffer", "hepatocyte", "neuron", "astrocyte"],
        "marks": ["x|y", "x", "x", "y"],
    }
)


@pytest.fixture
def dependent() -> MetadataEncoder:
    return MetadataEncoder.fit(SAMPLES, DEPENDENT)


def encode_row(encoder: MetadataEncoder, unknown: str = "refuse", **values) -> list:
    encoded = dense(encoder, pd.DataFrame([values]), unknown)
    return np.concatenate([matrix[0] for matrix in encoded.values()]).tolist()


def test_the_finer_covariate_of_a_group_determines_the_coarser(dependent):
    tissues = {"hepatocyte": "liver", "kupffer": "liver", "neuron": "brain"}
    assert dependent.dependencies == [
        FunctionalDependency("study", "platform", {"s1": "a", "s2": "a", "s3": "b"}),
        FunctionalDependency("cell_type", "tissue", tissues),  # an astrocyte has no tissue
    ]


def test_a_missing_determined_value_is_filled(dependent):
    complete = {"study": "s3", "platform": "b", "cell_type": "neuron", "tissue": "brain"}
    expected = encode_row(dependent, **complete)
    assert encode_row(dependent, study="s3", cell_type="neuron") == expected
    for missing in (None, "", " ", np.nan):
        assert encode_row(dependent, **complete | {"platform": missing}) == expected


def test_a_present_value_is_kept_though_training_lacks_the_combination(dependent):
    changed = encode_row(dependent, study="s3", platform="a")
    assert changed != encode_row(dependent, study="s3", platform="b")


def test_a_platform_of_one_study_does_not_determine_the_study(dependent):
    assert encode_row(dependent, platform="b")[:3] == [0, 0, 0]


def test_nothing_follows_from_an_unknown_or_undetermined_value(dependent):
    assert sum(encode_row(dependent, cell_type="astrocyte")) == 1
    assert sum(encode_row(dependent, "missing", study="new", cell_type="neuron")) == 2
    with pytest.raises(InputError, match="study"):
        encode_row(dependent, study="new")


def test_rows_are_filled_independently_of_their_order_and_type(dependent):
    query = pd.DataFrame(
        {"study": ["s1", "s3", None, "s2"] * 5, "platform": [None, "a", "b", ""] * 5}
    ).sample(frac=1, random_state=1)
    whole = dense(dependent, query)["technical"]
    for row in range(len(query)):
        single = dense(dependent, query.iloc[[row]])["technical"]
        np.testing.assert_array_equal(whole[[row]], single)
    np.testing.assert_array_equal(dense(dependent, query.astype("category"))["technical"], whole)


@pytest.mark.parametrize(
    "samples",
    [
        pd.concat([SAMPLES, SAMPLES.iloc[[0]].assign(platform="b")], ignore_index=True),
        SAMPLES.iloc[[0, 3]],  # one study each: a query without study may mean another one
    ],
    ids=["an exception", "one to one"],
)
def test_other_covariates_do_not_determine_each_other(samples):
    dependencies = MetadataEncoder.fit(samples, DEPENDENT).dependencies
    assert "platform" not in {dependency.determined for dependency in dependencies}


def test_class_labels_are_not_filled(dependent):
    assert dependent.labels(SAMPLES)["tissue"][3] == -1


def test_differing_dependencies_are_a_difference(dependent):
    other = MetadataEncoder(dependent.groups, dependent.dependencies[:1])
    assert other.differences(dependent) == ["the functional dependencies between covariates differ"]
    assert dependent.differences(MetadataEncoder.fit(SAMPLES, DEPENDENT)) == []
