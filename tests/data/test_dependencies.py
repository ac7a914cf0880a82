"""What levels always came with: filled where a query leaves it out, never where it could be otherwise."""

import json

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Covariates
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.encoder import MetadataEncoder

COVARIATES = Covariates.model_validate(
    {
        "technical": {
            "study": {"kind": "categorical"},
            "platform": {"kind": "categorical"},
            "date": {"kind": "numeric", "scale": "linear"},
        },
        "biological": {
            "tissue": {"kind": "categorical"},
            "cell_type": {"kind": "categorical"},
            "marks": {"kind": "multilabel"},
        },
        "perturbation": {},
    }
)
TRAINING = pd.DataFrame(
    {
        "study": ["s1", "s1", "s2", "s3"],
        "platform": ["a", "a", "a", "b"],  # s3 alone used b
        "date": [1, 1, 2, 3],
        "tissue": ["liver", "liver", "brain", None],
        "cell_type": ["kupffer", "hepatocyte", "neuron", "astrocyte"],
        "marks": ["x|y", "x", "x", "y"],
    }
)


@pytest.fixture
def encoder() -> MetadataEncoder:
    return MetadataEncoder.fit(TRAINING, COVARIATES)


def same(encoder: MetadataEncoder, query: dict, told: dict) -> bool:
    one, other = (encoder.encode(pd.DataFrame([row])) for row in (query, told))
    return all(np.array_equal(one[group], other[group]) for group in one)


def test_the_finer_level_tells_the_coarser_and_only_within_a_group(encoder):
    assert [(one.given, one.told) for one in encoder.implied] == [
        ("study", "platform"),
        ("cell_type", "tissue"),
    ]
    assert encoder.implied[0].levels == {"s1": "a", "s2": "a", "s3": "b"}
    assert encoder.implied[1].levels == {
        "hepatocyte": "liver",
        "kupffer": "liver",
        "neuron": "brain",
    }, "an astrocyte never said its tissue"


def test_what_a_query_leaves_out_is_filled(encoder):
    assert same(
        encoder,
        {"study": "s3", "cell_type": "neuron"},
        {"study": "s3", "platform": "b", "cell_type": "neuron", "tissue": "brain"},
    )
    for missing in (None, "", " ", np.nan):
        assert same(encoder, {"study": "s2", "platform": missing}, {"study": "s2", "platform": "a"})


def test_what_a_query_says_stays_though_training_never_saw_it(encoder):
    assert not same(encoder, {"study": "s3", "platform": "a"}, {"study": "s3", "platform": "b"})


def test_a_level_that_one_study_used_does_not_name_the_study(encoder):
    assert not encoder.encode(pd.DataFrame({"platform": ["b"]}))["technical"][:, :3].any()


def test_nothing_follows_from_what_training_does_not_tell(encoder):
    assert not encoder.encode(pd.DataFrame({"cell_type": ["astrocyte"]}))["biological"][:, :2].any()
    unknown = encoder.encode(
        pd.DataFrame({"study": ["new"], "cell_type": ["neuron"]}), unknown="missing"
    )
    assert not unknown["technical"].any()
    with pytest.raises(InputError, match="study"):
        encoder.encode(pd.DataFrame({"study": ["new"]}))


def test_rows_are_filled_one_by_one_whatever_their_order(encoder, rng):
    query = pd.DataFrame(
        {"study": ["s1", "s3", None, "s2"] * 5, "platform": [None, "a", "b", ""] * 5}
    ).sample(frac=1, random_state=1)
    whole = encoder.encode(query)["technical"]
    for row in range(len(query)):
        np.testing.assert_array_equal(whole[[row]], encoder.encode(query.iloc[[row]])["technical"])
    as_categories = query.astype({"study": "category", "platform": "category"})
    np.testing.assert_array_equal(encoder.encode(as_categories)["technical"], whole)


def test_levels_that_differ_once_imply_nothing():
    other = pd.concat([TRAINING, TRAINING.iloc[[0]].assign(platform="b")], ignore_index=True)
    assert "platform" not in {one.told for one in MetadataEncoder.fit(other, COVARIATES).implied}


def test_fields_that_name_each_other_one_to_one_are_not_filled():
    """A query that leaves out the only study of its platform may mean another study."""
    two = pd.DataFrame(
        {
            "study": ["s1", "s2"],
            "platform": ["a", "b"],
            "date": [1, 2],
            "tissue": None,
            "cell_type": None,
            "marks": None,
        }
    )
    assert MetadataEncoder.fit(two, COVARIATES).implied == []


def test_labels_of_heads_are_not_filled(encoder):
    assert encoder.labels(TRAINING)["tissue"][3] == -1


def test_it_is_kept_with_the_vocabulary_and_compared(encoder):
    again = MetadataEncoder.from_state(json.loads(json.dumps(encoder.state())))
    assert again.implied == encoder.implied and again.differences(encoder) == []
    again.implied.pop()
    assert again.differences(encoder) == [
        "levels of one covariate always came with other levels of another"
    ]
