"""Metadata encodings against matrices written by hand; missing and unknown are different things."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import GROUPS, Covariates
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.covariates import LOG_OFFSET, CovariateEncoder
from pipeline.gem.data.encoder import MetadataEncoder, clean_samples
from pipeline.gem.data.features import CLIP
from pipeline.gem.data.labels import label_texts

CATEGORICAL, MULTILABEL = {"kind": "categorical"}, {"kind": "multilabel"}
LINEAR, LOG = {"kind": "numeric", "scale": "linear"}, {"kind": "numeric", "scale": "log"}


def declare(technical=None, biological=None, perturbation=None) -> Covariates:
    return Covariates.model_validate(
        {
            "technical": technical or {},
            "biological": biological or {},
            "perturbation": perturbation or {},
        }
    )


def encoder_of(column: pd.Series | list, kind: dict) -> MetadataEncoder:
    """Learned from one biological column named `x`, cleaned as `prepare` does."""
    covariates = declare(biological={"x": kind})
    return MetadataEncoder.fit(
        clean_samples(pd.DataFrame({"x": column}), covariates, "file"), covariates
    )


def encoded(
    encoder: MetadataEncoder, column: pd.Series | list, unknown: str = "refuse"
) -> np.ndarray:
    return encoder.encode(pd.DataFrame({"x": column}), unknown)["biological"]


# encodings by hand


def test_a_categorical_value_is_one_hot_in_sorted_levels():
    encoder = encoder_of(["b", "a", None, "b"], CATEGORICAL)
    assert np.array_equal(encoded(encoder, ["a", "b", None]), [[1, 0], [0, 1], [0, 0]])


def test_a_multilabel_value_is_multi_hot():
    encoder = encoder_of(["b|a", "c", None], MULTILABEL)
    assert np.array_equal(
        encoded(encoder, ["a", "c | b", "b|b", "|a|", None]),
        [[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]],
    )


def test_a_number_is_standardised_with_one_flag_per_dimension():
    encoder = encoder_of([10.0, 20.0, 30.0, None], LINEAR)
    deviation = np.sqrt(200 / 3)
    assert encoded(encoder, [20.0, 30.0, None]) == pytest.approx(
        np.array([[0, 1], [10 / deviation, 1], [0, 0]])
    )


def test_a_number_on_the_log_scale_is_the_logarithm_with_an_offset():
    encoder = encoder_of(["1 uM", "100 uM"], LOG)
    low, high = np.log(1 + LOG_OFFSET), np.log(100 + LOG_OFFSET)
    value = (np.log(10 + LOG_OFFSET) - (low + high) / 2) / ((high - low) / 2)
    assert encoded(encoder, ["10 uM", "10000 nM", "0.01 mM"]) == pytest.approx(
        np.array([[value, 1]] * 3), abs=1e-6
    )


def test_dimensions_of_one_column_have_their_own_flags():
    encoder = encoder_of(["1 uM", "1 mg/ml"], LOG)
    assert encoder.groups["biological"][0].levels == ("concentration", "molarity")
    assert encoded(encoder, ["1 uM", "1 mg/ml"])[:, 1:].tolist() == [[0, 1], [1, 0]]


def test_extreme_numbers_are_clipped():
    encoder = encoder_of([0.0, 1.0], LINEAR)
    assert encoded(encoder, [1e9, -1e9])[:, 0].tolist() == [CLIP, -CLIP]


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, 1 / 3, 1e-7, 1e7 + 0.1, "24 hours"])
@pytest.mark.parametrize("scale", [LINEAR, LOG], ids=["linear", "log"])
def test_a_number_that_never_varies_encodes_as_zero_at_its_value_and_stays_moderate_beside_it(
    value, scale
):
    """Rounding leaves a deviation of about 1e-17 in some constant columns: dividing by it would make noise of it."""
    encoder = encoder_of([value] * 7, scale)
    assert encoded(encoder, [value]) == pytest.approx(np.array([[0, 1]]), abs=1e-6)
    assert encoder.groups["biological"][0].deviation == 1.0


def test_groups_and_fields_stand_in_the_order_of_their_declaration():
    covariates = declare(
        {"study": CATEGORICAL}, {"sex": CATEGORICAL, "age": LINEAR}, {"drug": CATEGORICAL}
    )
    samples = pd.DataFrame(
        {"drug": ["d", "e"], "age": [1.0, 3.0], "sex": ["f", "m"], "study": ["s", "s"]}
    )
    encoder = MetadataEncoder.fit(samples, covariates)
    assert encoder.names == ["study", "sex", "age", "drug"]
    assert encoder.sizes == {"technical": 1, "biological": 4, "perturbation": 2}
    assert encoder.blocks("biological") == [(2, 0), (2, 0)]
    assert [encoder.group_of(name) for name in encoder.names] == [
        "technical",
        "biological",
        "biological",
        "perturbation",
    ]
    result = encoder.encode(samples)
    assert list(result) == list(GROUPS)
    assert result["biological"].tolist() == [[1, 0, -1, 1], [0, 1, 1, 1]]
    assert result["technical"].tolist() == [[1], [1]]
    assert all(matrix.dtype == np.float32 for matrix in result.values())


def test_a_group_without_covariates_has_no_columns():
    encoder = encoder_of(["a"], CATEGORICAL)
    result = encoder.encode(pd.DataFrame({"x": ["a", "a", None]}))
    assert (
        result["technical"].shape,
        result["biological"].shape,
        result["perturbation"].shape,
    ) == ((3, 0), (3, 1), (3, 0))


@pytest.mark.parametrize(
    ("kind", "size"), [(CATEGORICAL, 0), (MULTILABEL, 0), (LINEAR, 1), (LOG, 1)]
)
def test_a_column_missing_in_all_of_training_is_allowed_and_finite(kind, size):
    encoder = encoder_of([None, None], kind)
    assert encoder.sizes["biological"] == size
    assert not encoded(encoder, [None, None]).any()


def test_a_table_without_rows_has_an_encoding_without_rows():
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert encoder.encode(pd.DataFrame({"x": pd.Series([], dtype=object)}))["biological"].shape == (
        0,
        2,
    )


# missing and unknown


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
@pytest.mark.parametrize(
    "kind", [CATEGORICAL, MULTILABEL, LINEAR], ids=["categorical", "multilabel", "numeric"]
)
def test_a_missing_value_of_any_kind_encodes_as_zeros(kind, missing):
    encoder = encoder_of(["1", "2"], kind)
    assert not encoded(encoder, pd.Series([missing, "1"], dtype=object))[0].any()


def test_a_column_absent_from_the_query_is_missing_everywhere():
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert np.array_equal(
        encoder.encode(pd.DataFrame({"y": [1, 2, 3]}))["biological"], np.zeros((3, 2))
    )


def test_an_unknown_value_is_refused_with_column_first_row_and_close_match():
    encoder = encoder_of(["liver", "kidney"], CATEGORICAL)
    with pytest.raises(InputError) as caught:
        encoded(encoder, ["liver", None, "livr", "livr", "moon"])
    first, second = caught.value.problems
    assert "x, row 2: 'livr' was never seen in training; did you mean liver?" in first
    assert "x, row 4: 'moon' was never seen" in second and "kidney, liver" in second


def test_unknown_values_of_all_columns_are_reported_at_once():
    covariates = declare({"a": CATEGORICAL}, {"b": MULTILABEL}, {"c": LINEAR, "d": LINEAR})
    encoder = MetadataEncoder.fit(
        pd.DataFrame({"a": ["x"], "b": ["x|y"], "c": ["1 h"], "d": [1.0]}), covariates
    )
    with pytest.raises(InputError) as caught:
        encoder.encode(pd.DataFrame({"a": ["z"], "b": ["x|z"], "c": ["1 uM"], "d": ["old"]}))
    assert [problem.split(",")[0] for problem in caught.value.problems] == ["a", "b", "c", "d"]


def test_an_unknown_value_is_missing_on_request():
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert encoded(encoder, ["b", "z"], unknown="missing").tolist() == [[0, 1], [0, 0]]
    labels = encoder_of(["a|b"], MULTILABEL)
    assert encoded(labels, ["a|z", "a"], unknown="missing").tolist() == [[0, 0], [1, 0]]
    times = encoder_of(["1 h", "2 h"], LINEAR)
    assert not encoded(times, ["1 uM"], unknown="missing").any()


def test_text_that_is_no_quantity_is_refused_even_where_unknown_is_missing():
    with pytest.raises(InputError, match="x, row 1: 'old'"):
        encoded(encoder_of([1.0, 2.0], LINEAR), ["1", "old"], unknown="missing")


def test_another_treatment_of_unknown_values_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="ignore"):
        encoded(encoder_of(["a"], CATEGORICAL), ["a"], unknown="ignore")


# what does not matter


def test_the_encoding_of_a_row_does_not_depend_on_the_others(rng):
    covariates = declare({"study": CATEGORICAL}, {"age": LINEAR}, {"drug": MULTILABEL, "dose": LOG})
    samples = pd.DataFrame(
        {
            "study": rng.choice(["s1", "s2", None], 50),
            "age": rng.choice([1.5, 20.0, np.nan], 50),
            "drug": rng.choice(["a", "b|c", "a|c", None], 50),
            "dose": rng.choice(["1 uM", "10 nM", "3 mg/ml", None], 50),
        }
    )
    encoder = MetadataEncoder.fit(samples, covariates)
    order = rng.permutation(50)
    whole, permuted = encoder.encode(samples), encoder.encode(samples.iloc[order])
    single = [encoder.encode(samples.iloc[[row]]) for row in range(50)]
    for group in GROUPS:
        assert np.array_equal(permuted[group], whole[group][order])
        assert np.array_equal(np.concatenate([row[group] for row in single]), whole[group])


def test_what_is_learned_does_not_depend_on_the_order_of_the_rows(rng):
    values = pd.Series(["3 h", "1 uM", None, "2 days", "0.5 uM"] * 5)
    one, other = (
        encoder_of(values, LOG),
        encoder_of(values.sample(frac=1, random_state=3).reset_index(drop=True), LOG),
    )
    assert one.groups["biological"][0].levels == other.groups["biological"][0].levels
    assert one.groups["biological"][0].mean == pytest.approx(
        other.groups["biological"][0].mean, rel=1e-12
    )


def test_standardisation_uses_the_given_rows_only():
    samples = pd.DataFrame({"x": [1.0, 3.0, 1000.0]})
    encoder = MetadataEncoder.fit(samples.iloc[:2], declare(biological={"x": LINEAR}))
    assert (encoder.groups["biological"][0].mean, encoder.groups["biological"][0].deviation) == (
        2.0,
        1.0,
    )


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([1, 2, 3]),
        pd.Series([1, 2, 3], dtype=np.int8),
        pd.Series([1, 2, 3], dtype=np.uint64),
        pd.Series([1, 2, 3], dtype=np.float32),
        pd.Series([1, 2, 3], dtype="Int64"),
        pd.Series([1, 2, 3], dtype="Float64"),
        pd.Series([1, 2, 3], dtype="category"),
        pd.Series(["1", "2", "3"], dtype="category"),
        pd.Series(["1", "2", "3"], dtype="string"),
        pd.Series([" 1", "2.0", "3e0 "]),
        pd.Series([1, "2", 3.0], dtype=object),
    ],
    ids=lambda column: f"{column.dtype}",
)
def test_numbers_of_every_type_are_the_same_numbers(column):
    reference = encoded(encoder_of([1.0, 2.0, 3.0], LINEAR), [1.0, 2.0, 3.0])
    assert encoded(encoder_of(column, LINEAR), column) == pytest.approx(reference)


@pytest.mark.parametrize("dtype", ["object", "category", "string", "Int64", "Float64"])
def test_labels_in_every_text_type_are_the_same_labels(dtype):
    column = (
        pd.Series(["1", "2", None, "1"]).astype(float).astype("Int64").astype(dtype)
        if dtype in ("Int64", "Float64")
        else pd.Series(["1", "2", None, "1"], dtype=dtype)
    )
    cleaned = clean_samples(
        pd.DataFrame({"x": column}), declare(biological={"x": CATEGORICAL}), "file"
    )["x"]
    assert [value if value is None else str(value) for value in cleaned] == ["1", "2", None, "1"]


def test_whole_number_labels_are_the_same_with_and_without_a_missing_one():
    """pandas makes floats of an integer column as soon as one value is missing."""
    trained = encoder_of(pd.Series([1, 2, np.nan]), CATEGORICAL)
    assert encoded(trained, pd.Series([1, 2])).tolist() == [[1, 0], [0, 1]]


def test_unused_levels_of_a_categorical_column_are_not_learned():
    column = pd.Series(pd.Categorical(["a", "b"], categories=["z", "b", "a"]))
    assert encoder_of(column, CATEGORICAL).groups["biological"][0].levels == ("a", "b")


def test_a_boolean_column_has_two_labels():
    assert encoder_of(pd.Series([True, False, True]), CATEGORICAL).groups["biological"][
        0
    ].levels == ("False", "True")


# state


@pytest.mark.parametrize(
    "kind",
    [CATEGORICAL, MULTILABEL, LINEAR, LOG],
    ids=["categorical", "multilabel", "linear", "log"],
)
def test_the_state_is_plain_and_restores_the_same_encoding(kind):
    import json

    encoder = encoder_of(["1", "2", None], kind)
    restored = MetadataEncoder.from_state(json.loads(json.dumps(encoder.state(), allow_nan=False)))
    assert restored.groups == encoder.groups
    assert np.array_equal(encoded(restored, ["2", None]), encoded(encoder, ["2", None]))


def test_the_size_of_a_vocabulary_is_the_width_of_its_encoding():
    for kind in (CATEGORICAL, MULTILABEL, LINEAR, LOG):
        field = encoder_of(["1", "2"], kind).groups["biological"][0]
        assert isinstance(field, CovariateEncoder) and field.encode_value("1").shape == (
            field.size,
        )


# labels


def test_labels_are_class_indices_and_minus_one_where_missing_or_unknown():
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
    labels = encoder.labels(query)
    assert {name: label.tolist() for name, label in labels.items()} == {
        "tissue": [0, 1, -1, -1],
        "drug": [1, -1, 0, 0],
    }
    assert [field.name for field in encoder.heads()] == ["tissue", "drug"]


@pytest.mark.parametrize("dtype", ["object", "category", "string"])
def test_labels_do_not_depend_on_the_type_of_the_column(dtype):
    encoder = encoder_of(["a", "b"], CATEGORICAL)
    assert encoder.labels(pd.DataFrame({"x": pd.Series(["b", "a", None], dtype=dtype)}))[
        "x"
    ].tolist() == [1, 0, -1]


def test_labels_agree_with_the_encoding_for_labels_that_are_numbers():
    encoder = encoder_of([1, 2], CATEGORICAL)
    query = pd.DataFrame({"x": [2, 1]})
    assert (
        encoder.labels(query)["x"].tolist()
        == encoder.encode(query)["biological"].argmax(axis=1).tolist()
    )


# cleaning


def test_empty_text_and_white_space_are_missing_and_text_is_trimmed():
    cleaned = clean_samples(
        pd.DataFrame({"x": ["", "  ", " a ", None, "a"]}),
        declare(biological={"x": CATEGORICAL}),
        "file",
    )
    assert cleaned["x"].tolist() == [None, None, "a", None, "a"]


def test_numbers_become_numbers_and_quantities_stay_as_written():
    covariates = declare(biological={"plain": LINEAR, "units": LOG})
    cleaned = clean_samples(
        pd.DataFrame({"plain": ["1", " 2.5 ", ""], "units": ["1 uM", "2", None]}),
        covariates,
        "file",
    )
    assert cleaned["plain"].tolist()[:2] == [1.0, 2.5] and np.isnan(cleaned["plain"].iloc[2])
    assert cleaned["units"].tolist() == ["1 uM", "2", None]


def test_a_unit_in_one_cell_does_not_change_what_the_others_say():
    """Otherwise the metadata of a test sample would move the identity of what training sees."""
    covariates = declare(biological={"age": LINEAR})
    for column in (
        [55.0, 0.1, 1e-7, None],
        ["55", " 0.10", "1e-7", ""],
        [np.float32(55), np.float32(0.1), 1e-7, np.nan],
    ):
        plain, mixed = (
            clean_samples(
                pd.DataFrame({"age": pd.Series([*column, last], dtype=object)}), covariates, "file"
            )["age"]
            for last in (3.0, "3 years")
        )
        assert plain.dtype == float and mixed.iloc[-1] == "3 years"
        assert (
            label_texts(plain).tolist()[:-1]
            == label_texts(mixed).tolist()[:-1]
            == ["55", "0.1", "1e-07", None]
        )


def test_all_problems_of_a_table_are_collected():
    covariates = declare({"studdy": CATEGORICAL}, {"age": LINEAR}, {"dose": LOG, "time": LOG})
    samples = pd.DataFrame(
        {
            "study": ["s"] * 4,
            "age": ["1", "old", None, "old"],
            "dose": ["1 uM", "-1 uM", "1", "1"],
            "time": ["1 fortnight", "1 h", "inf", ""],
        }
    )
    with pytest.raises(InputError) as caught:
        clean_samples(samples, covariates, "table")
    text = "\n".join(caught.value.problems)
    assert all(
        problem.startswith("table: ") and "\n" not in problem for problem in caught.value.problems
    )
    assert "column studdy is declared in data.covariates but absent; did you mean study?" in text
    assert "age: 'old'" in text and "(rows 1, 3)" in text
    assert "dose: -1.0 is negative" in text
    assert "time: '1 fortnight' has the unknown unit 'fortnight'" in text
    assert "time: 'inf' is not a number" in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("value", [np.inf, -np.inf, True, np.True_, pd.Timestamp("2020-01-01")])
def test_what_is_no_number_is_refused_in_words_of_the_table(value):
    with pytest.raises(InputError) as caught:
        clean_samples(
            pd.DataFrame({"x": pd.Series([1.0, value], dtype=object)}),
            declare(biological={"x": LINEAR}),
            "table",
        )
    assert "np." not in str(caught.value) and "Timestamp(" not in str(caught.value)


def test_a_list_in_a_cell_is_refused_by_column():
    with pytest.raises(InputError, match="x"):
        clean_samples(
            pd.DataFrame({"x": [np.array(["a", "b"]), np.array(["c", "d"])]}),
            declare(biological={"x": CATEGORICAL}),
            "table",
        )


def test_cleaning_leaves_the_table_and_its_other_columns_alone():
    samples = pd.DataFrame({"x": [" a "], "other": [" b "]})
    cleaned = clean_samples(samples, declare(biological={"x": CATEGORICAL}), "table")
    assert samples["x"].tolist() == [" a "] and cleaned["other"].tolist() == [" b "]


def test_cleaning_twice_is_cleaning_once():
    covariates = declare({"a": CATEGORICAL}, {"b": LINEAR}, {"c": LOG})
    samples = pd.DataFrame(
        {"a": [" x", "", None], "b": ["1", " 2", None], "c": ["1 uM", "", "2 nM"]}
    )
    once = clean_samples(samples, covariates, "table")
    pd.testing.assert_frame_equal(clean_samples(once, covariates, "table"), once)
