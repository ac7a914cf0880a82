"""Metadata encodings against matrices written by hand; missing values are not unknown ones."""

import numpy as np
import pandas as pd
import pytest
from support.encoding import dense

from pipeline.gem.common.config import GROUPS, Covariates
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.covariates import LOG_OFFSET
from pipeline.gem.data.encoder import MetadataEncoder, distinct_rows
from pipeline.gem.data.features import CLIP

CATEGORICAL, MULTILABEL = {"kind": "categorical"}, {"kind": "multilabel"}
LINEAR, LOG = {"kind": "numeric", "scale": "linear"}, {"kind": "numeric", "scale": "log"}
KINDS = {"categorical": CATEGORICAL, "multilabel": MULTILABEL, "linear": LINEAR, "log": LOG}


def declare(technical=None, biological=None, perturbation=None) -> Covariates:
    groups = {"technical": technical, "biological": biological, "perturbation": perturbation}
    return Covariates.model_validate({group: value or {} for group, value in groups.items()})


def encoder_of(column: pd.Series | list, kind: dict) -> MetadataEncoder:
    """Fitted to one biological column `x`, cleaned as in `prepare`."""
    covariates = declare(biological={"x": kind})
    cleaned = clean_samples(pd.DataFrame({"x": column}), covariates, "file")
    return MetadataEncoder.fit(cleaned, covariates)


def encode(encoder: MetadataEncoder, column, unknown: str = "refuse") -> np.ndarray:
    return dense(encoder, pd.DataFrame({"x": column}), unknown)["biological"]


# encodings


def test_a_categorical_value_is_one_hot_in_sorted_levels():
    encoder = encoder_of(["b", "a", None, "b"], CATEGORICAL)
    assert encode(encoder, ["a", "b", None]).tolist() == [[1, 0], [0, 1], [0, 0]]


def test_a_multilabel_value_is_multi_hot():
    encoder = encoder_of(["b|a", "c", None], MULTILABEL)
    codes = encode(encoder, ["a", "c | b", "b|b", "|a|", None])
    assert codes.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_a_number_is_standardised_and_has_its_dimension():
    encoder = encoder_of([10.0, 20.0, 30.0, None], LINEAR)
    expected = [[0, 1], [10 / np.sqrt(200 / 3), 1], [0, 0]]
    assert encode(encoder, [20.0, 30.0, None]) == pytest.approx(np.array(expected))


def test_a_number_on_the_log_scale_is_the_logarithm_with_an_offset():
    encoder = encoder_of(["1 uM", "100 uM"], LOG)
    low, high = np.log(1 + LOG_OFFSET), np.log(100 + LOG_OFFSET)
    value = (np.log(10 + LOG_OFFSET) - (low + high) / 2) / ((high - low) / 2)
    codes = encode(encoder, ["10 uM", "10000 nM", "0.01 mM"])
    assert codes == pytest.approx(np.array([[value, 1]] * 3), abs=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("scale", [LINEAR, LOG], ids=["linear", "log"])
def test_doses_of_any_magnitude_are_encoded_alike(factor, scale):
    """Doses in mol/l are as far apart as in umol/l."""
    doses = np.array([1.0, 10.0, 100.0, 10_000.0])
    codes, expected = (encode(encoder_of(x, scale), x)[:, 0] for x in (factor * doses, doses))
    assert codes == pytest.approx(expected, abs=1e-3)


def test_numbers_of_a_query_have_the_declared_unit():
    encoder = encoder_of(["24", "48h", "1 year"], LOG | {"kind": "quantity", "unit": "h"})
    codes = encode(encoder, ["24", 24, "24 h", "1 day", "8766"])
    assert (codes[:4] == codes[0]).all()
    assert (codes[4] == encode(encoder, ["1 year"])[0]).all()


QUERIES = {
    "another dimension": (["1 h", "2 h"], "1 uM", "another dimension than in training: time"),
    "a number without unit": (["1 h", "2 h"], 24, "another dimension than in training: time"),
    "a unit": (["1", "2"], "24 h", "another dimension than in training: plain numbers"),
    "m": (["1 h", "2 h"], "30m", "m is ambiguous; write min"),
    "M": (["1 h", "2 h"], "30M", "M is ambiguous; write min"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_quantities_of_a_query_follow_the_same_rules(name):
    training, value, message = QUERIES[name]
    with pytest.raises(InputError, match=f"x, row 0: .*{message}"):
        encode(encoder_of(training, LOG), [value])


def test_dimensions_of_one_column_are_one_hot():
    encoder = encoder_of(["1 uM", "1 mg/ml"], LOG | {"kind": "quantity", "unit": "any"})
    assert encoder.fields[0].levels == ("concentration", "molarity")
    assert encode(encoder, ["1 uM", "1 mg/ml"])[:, 1:].tolist() == [[0, 1], [1, 0]]


def test_extreme_numbers_are_clipped():
    codes = encode(encoder_of([0.0, 1.0], LINEAR), [1e9, -1e9])
    assert codes[:, 0].tolist() == [CLIP, -CLIP]


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, 1 / 3, 1e-7, 1e7 + 0.1, "24 hours"])
@pytest.mark.parametrize("scale", [LINEAR, LOG], ids=["linear", "log"])
def test_a_constant_number_encodes_as_zero(value, scale):
    """Rounding leaves a deviation of about 1e-17, which is not a scale."""
    encoder = encoder_of([value] * 7, scale)
    assert encode(encoder, [value]) == pytest.approx(np.array([[0, 1]]), abs=1e-6)
    assert encoder.fields[0].deviation == 1.0


def test_groups_and_covariates_are_in_the_order_of_their_declaration():
    covariates = declare(
        {"study": CATEGORICAL}, {"sex": CATEGORICAL, "age": LINEAR}, {"drug": CATEGORICAL}
    )
    samples = pd.DataFrame(
        {"drug": ["d", "e"], "age": [1.0, 3.0], "sex": ["f", "m"], "study": ["s", "s"]}
    )
    encoder = MetadataEncoder.fit(samples, covariates)
    assert encoder.names == ["study", "sex", "age", "drug"]
    assert encoder.inputs == {"technical": 1, "biological": 4, "perturbation": 2}
    columns = encoder.columns("biological")
    assert [(part.field.name, part.own) for part in columns] == [
        ("sex", slice(0, 2)),
        ("age", slice(2, 4)),
    ]
    groups = [encoder.group_of(name) for name in encoder.names]
    assert groups == ["technical", "biological", "biological", "perturbation"]
    encoded = dense(encoder, samples)
    assert list(encoded) == list(GROUPS)
    assert encoded["biological"].tolist() == [[1, 0, -1, 1], [0, 1, 1, 1]]
    assert encoded["technical"].tolist() == [[1], [1]]
    assert all(matrix.dtype == np.float32 for matrix in encoded.values())


@pytest.mark.parametrize("rows", [["a", "a", None], []])
def test_a_group_without_covariates_has_no_columns(rows):
    encoded = dense(encoder_of(["a"], CATEGORICAL), pd.DataFrame({"x": pd.Series(rows, dtype=str)}))
    assert [matrix.shape for matrix in encoded.values()] == [
        (len(rows), size) for size in (0, 1, 0)
    ]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_column_may_be_missing_in_all_training_samples(kind):
    encoder = encoder_of([None, None], kind)
    assert encoder.inputs["biological"] == int(kind["kind"] == "numeric")
    assert not encode(encoder, [None, None]).any()


# missing and unknown values


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_missing_value_encodes_as_zeros(kind, missing):
    encoder = encoder_of(["1", "2"], kind)
    assert not encode(encoder, pd.Series([missing, "1"], dtype=object))[0].any()


def test_an_absent_column_is_missing_throughout():
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert dense(encoder, pd.DataFrame({"y": [1, 2]}))["biological"].tolist() == [[0, 0], [0, 0]]


def test_an_unknown_value_is_an_error_with_column_first_row_and_close_match():
    with pytest.raises(InputError) as caught:
        encode(
            encoder_of(["liver", "kidney"], CATEGORICAL), ["liver", None, "livr", "livr", "moon"]
        )
    advice = "(or treat unknown values as missing)"
    assert list(caught.value.problems) == [
        f"x, row 2: 'livr' was never seen in training; did you mean liver? {advice}",
        f"x, row 4: 'moon' was never seen in training; known: kidney, liver {advice}",
    ]


def test_problems_of_all_columns_are_reported_at_once():
    covariates = declare({"a": CATEGORICAL}, {"b": MULTILABEL}, {"c": LINEAR, "d": LINEAR})
    samples = pd.DataFrame({"a": ["x"], "b": ["x|y"], "c": ["1 h"], "d": [1.0], "e": ["x"]})
    encoder = MetadataEncoder.fit(samples, covariates)
    query = pd.DataFrame({"a": [["z"]], "b": ["x|z"], "c": ["1 uM"], "d": ["old"]})
    with pytest.raises(InputError) as caught:
        encoder.encode(query)
    starts = [
        "a: a list in a cell; expected one value",
        "b, row 0: 'x|z' was never seen",
        "c, row 0: '1 uM' has another dimension than in training: time",
        "d, row 0: 'old' is not a number",
    ]
    problems = caught.value.problems
    assert all(line.startswith(start) for line, start in zip(problems, starts, strict=True))


@pytest.mark.parametrize(
    ("training", "kind", "value"),
    [(["a", "b"], CATEGORICAL, "z"), (["a|b"], MULTILABEL, "a|z"), (["1 h"], LINEAR, "1 uM")],
)
def test_an_unknown_value_is_missing_on_request(training, kind, value):
    assert not encode(encoder_of(training, kind), [value], unknown="missing").any()


def test_a_label_in_fewer_training_samples_than_min_count_is_unknown():
    column = ["a", "a", "b", "b", "rare", None]
    encoder = encoder_of(column, CATEGORICAL | {"min_count": 2})
    assert encoder.fields[0].levels == ("a", "b")
    assert encode(encoder, ["b", "rare"], unknown="missing").tolist() == [[0, 1], [0, 0]]
    assert encoder.labels(pd.DataFrame({"x": column}))["x"].tolist() == [0, 0, 1, 1, -1, -1]
    message = "x, row 0: 'rare' was in fewer than 2 samples; known: a, b"
    with pytest.raises(InputError, match=message):
        encode(encoder, ["rare"])
    kept = encoder.without_rare(pd.DataFrame({"x": column}))["x"]
    assert kept.isna().tolist() == [False] * 4 + [True] * 2


def test_of_several_labels_the_rare_one_alone_is_missing():
    encoder = encoder_of(["a|b", "a|b", "b|rare", "b"], MULTILABEL | {"min_count": 2})
    codes = encode(encoder, ["a|rare", "rare", "b"], unknown="missing")
    assert codes.tolist() == [[1, 0], [0, 0], [0, 1]]
    with pytest.raises(InputError, match="in fewer than 2 samples"):
        encode(encoder, ["a|rare"])


def test_an_invalid_quantity_is_an_error_even_if_unknown_values_are_missing():
    with pytest.raises(InputError, match="x, row 1: 'old'"):
        encode(encoder_of([1.0, 2.0], LINEAR), ["1", "old"], unknown="missing")


def test_unknown_values_are_refused_or_missing():
    with pytest.raises(ValueError, match="ignore"):
        encode(encoder_of(["a"], CATEGORICAL), ["a"], unknown="ignore")


# invariances


def test_the_encoding_of_a_row_does_not_depend_on_other_rows(rng):
    covariates = declare({"study": CATEGORICAL}, {"age": LINEAR}, {"drug": MULTILABEL, "dose": LOG})
    samples = pd.DataFrame(
        {
            "study": rng.choice(["s1", "s2", None], 50),
            "age": rng.choice([1.5, 20.0, np.nan], 50),
            "drug": rng.choice(["a", "b|c", "a|c", None], 50),
            "dose": rng.choice(["1 uM", "10 nM", "3 mg/ml", None], 50),
        }
    )
    encoder, order = MetadataEncoder.fit(samples, covariates), rng.permutation(50)
    whole, permuted = dense(encoder, samples), dense(encoder, samples.iloc[order])
    single = [dense(encoder, samples.iloc[[row]]) for row in range(50)]
    for group in GROUPS:
        assert np.array_equal(permuted[group], whole[group][order])
        assert np.array_equal(np.concatenate([row[group] for row in single]), whole[group])


def test_the_fit_does_not_depend_on_the_order_of_rows():
    values = pd.Series(["3 h", "1 uM", None, "2 days", "0.5 uM"] * 5)
    declared = LOG | {"kind": "quantity", "unit": "any"}
    (one,) = encoder_of(values, declared).fields
    shuffled = values.sample(frac=1, random_state=3, ignore_index=True)
    (other,) = encoder_of(shuffled, declared).fields
    assert one.levels == other.levels
    assert (one.mean, one.deviation) == pytest.approx((other.mean, other.deviation), rel=1e-12)


def test_numbers_are_standardised_over_the_training_rows_alone():
    samples = pd.DataFrame({"x": [1.0, 3.0, 1000.0]})
    (field,) = MetadataEncoder.fit(samples.iloc[:2], declare(biological={"x": LINEAR})).fields
    assert (field.mean, field.deviation) == (2.0, 1.0)


NUMBERS = [
    *(pd.Series([1, 2, 3], dtype=kind) for kind in (np.int8, np.uint64, np.float32, "Int64")),
    *(pd.Series([1, 2, 3], dtype=kind) for kind in ("Float64", "category")),
    *(pd.Series(["1", "2", "3"], dtype=kind) for kind in ("category", "string")),
    pd.Series([" 1", "2.0", "3e0 "]),
    pd.Series([1, "2", 3.0], dtype=object),
]


@pytest.mark.parametrize("column", NUMBERS, ids=lambda column: f"{column.dtype}")
def test_numbers_do_not_depend_on_their_type(column):
    reference = encode(encoder_of([1.0, 2.0, 3.0], LINEAR), [1.0, 2.0, 3.0])
    assert encode(encoder_of(column, LINEAR), column) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("column", "levels"),
    [
        (pd.Series([1, 2, np.nan]), ("1", "2")),  # floats, because a value is missing
        (pd.Series(pd.Categorical(["a", "b"], categories=["z", "b", "a"])), ("a", "b")),
        (pd.Series([True, False, True]), ("False", "True")),
    ],
    ids=["whole floats", "unused category", "booleans"],
)
def test_levels_are_the_texts_of_the_training_values(column, levels):
    assert encoder_of(column, CATEGORICAL).fields[0].levels == levels


# class labels


def test_class_labels_are_positions_of_levels_or_minus_one():
    covariates = declare(
        {"study": CATEGORICAL},
        {"tissue": CATEGORICAL, "age": LINEAR, "tags": MULTILABEL, "single": CATEGORICAL},
        {"drug": CATEGORICAL},
    )
    samples = pd.DataFrame(
        {
            "study": ["s", "t"],
            "tissue": ["b", "a"],
            "age": [1.0, 2.0],
            "tags": ["x", "y"],
            "single": ["only", "only"],
            "drug": ["d", "e"],
        }
    )
    encoder = MetadataEncoder.fit(samples, covariates)
    query = pd.DataFrame({"tissue": ["a", "b", None, "moon"], "drug": ["e", None, "d", "d"]})
    labels = {name: label.tolist() for name, label in encoder.labels(query).items()}
    assert labels == {"tissue": [0, 1, -1, -1], "drug": [1, -1, 0, 0]}


@pytest.mark.parametrize("dtype", ["object", "category", "string"])
def test_class_labels_do_not_depend_on_the_type_of_the_column(dtype):
    column = pd.Series(["b", "a", None], dtype=dtype)
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert encoder.labels(pd.DataFrame({"x": column}))["x"].tolist() == [1, 0, -1]


def test_class_labels_agree_with_the_encoding():
    encoder, query = encoder_of([1, 2], CATEGORICAL), pd.DataFrame({"x": [2, 1]})
    positions = dense(encoder, query)["biological"].argmax(axis=1)
    assert encoder.labels(query)["x"].tolist() == positions.tolist()


# comparison and distinct rows


def test_differences_between_encoders_are_one_message_per_covariate():
    fitted = encoder_of(["a", "b"], CATEGORICAL)
    assert fitted.differences(encoder_of(["b", "a"], CATEGORICAL)) == []
    assert encoder_of(["1", "3"], LINEAR).differences(encoder_of(["1", "5"], LINEAR)) == [
        "x: mean 2 and deviation 1 in the model, 3 and 2 in the data"
    ]
    assert fitted.differences(encoder_of(["a", "c"], CATEGORICAL)) == [
        "x: 1 labels of the model that the data lacks (b), 1 of the data that the model lacks (c)"
    ]
    assert fitted.differences(encoder_of(["a"], MULTILABEL)) == [
        "x: categorical in group biological in the model, "
        "multilabel in group biological in the data"
    ]
    other = MetadataEncoder.fit(pd.DataFrame({"y": ["a"]}), declare(biological={"y": CATEGORICAL}))
    expected = ["covariates x in the model only", "covariates y in the data only"]
    assert fitted.differences(other) == expected


def test_the_distinct_rows_do_not_depend_on_the_order_of_the_samples(rng):
    covariates = declare({"study": CATEGORICAL}, {}, {"drug": MULTILABEL, "dose": LOG})
    samples = pd.DataFrame(
        {
            "study": rng.choice(["s1", "s2", None], 60),
            "drug": rng.choice(["a", "b|c", "c|b", None], 60),
            "dose": rng.choice(["1 uM", "1000 nM", "3 uM", None], 60),
        }
    )
    encoder, order = MetadataEncoder.fit(samples, covariates), rng.permutation(60)
    whole, permuted = encoder.encode(samples), encoder.encode(samples.iloc[order])
    for group in ("technical", "perturbation"):
        distinct = whole[group].distinct.toarray()
        assert np.array_equal(permuted[group].distinct.toarray(), distinct)
        assert np.array_equal(permuted[group].index, whole[group].index[order])
        # Values that are encoded alike make one row.
        assert len(distinct) == len(np.unique(distinct, axis=0))


def test_memory_grows_with_entries_and_not_with_rows_times_levels():
    names = [f"level{number}" for number in range(4000)]
    samples = pd.DataFrame({"study": names})
    encoder = MetadataEncoder.fit(samples, declare({"study": CATEGORICAL}))
    rows = encoder.encode(samples)["technical"]
    assert rows.distinct.shape == (4000, 4000) and rows.distinct.nnz == 4000


@pytest.mark.parametrize("largest", [2, 2**40])
@pytest.mark.parametrize("shape", [(200, 3), (1, 3), (0, 3), (5, 0)])
def test_distinct_rows_are_those_of_numpy(rng, shape, largest):
    codes = rng.integers(0, 3, shape) * largest
    first, index = distinct_rows(codes)
    np.testing.assert_array_equal(codes[first][index], codes)
    if shape[1]:
        expected, expected_first = np.unique(codes, axis=0, return_index=True)
        np.testing.assert_array_equal(codes[first], expected)
        np.testing.assert_array_equal(first, expected_first)
