"""Controls match by biology and study, then by study, then by context alone."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Covariates, Data
from pipeline.gem.data.references import (
    ControlGroups,
    SampleGroups,
    choose_references,
    matching_controls,
)


@pytest.fixture
def data(dosed) -> Data:
    covariates = dosed.covariates.model_dump()
    covariates["biological"]["sex"] = {"kind": "categorical"}
    update = {"covariates": Covariates.model_validate(covariates)}
    return dosed.model_copy(update=update)


def table(*rows: tuple) -> pd.DataFrame:
    columns = ["study", "tissue", "sex", "perturbation", "perturbation_dose"]
    return pd.DataFrame(rows, columns=columns)


POOL = table(
    ("s1", "liver", "f", "control", None),
    ("s1", "liver", "m", "control", None),
    ("s2", "liver", "f", "control", None),
    ("s1", "liver", "f", "drug", 1.0),
    ("s2", "brain", "f", "control", None),
)


@pytest.mark.parametrize(
    ("study", "tissue", "sex", "expected"),
    [
        ("s1", "liver", "f", [0]),
        ("s1", "liver", None, [0, 1]),
        ("s3", "liver", "f", [0, 1, 2]),
        ("s1", "brain", "f", [4]),
        ("s1", "heart", "f", []),
    ],
    ids=["biology", "study", "context", "another study", "none"],
)
def test_the_most_specific_controls_match(data, study, tissue, sex, expected):
    samples = table((study, tissue, sex, "drug", 1.0))
    (positions,) = matching_controls(samples, POOL, data)
    assert positions.tolist() == expected


def test_without_a_study_column_controls_match_by_biology_and_context(data):
    data = data.model_copy(update={"study_column": None})
    samples = table(("s1", "liver", "m", "drug", 1.0), ("s1", "liver", None, "drug", 1.0))
    matches = matching_controls(samples, POOL, data)
    assert [positions.tolist() for positions in matches] == [[1], [0, 1, 2]]


def test_a_sample_is_not_its_own_control(data):
    groups, matches = ControlGroups.of(POOL, data), []
    for start, size, own in zip(groups.start, groups.size, groups.own, strict=True):
        listed = groups.rows[start : start + size + (own <= size)].tolist() if size else []
        matches.append([row for position, row in enumerate(listed) if position != own])
    assert matches == [[1], [0], [0, 1], [0], []]


def test_a_pool_without_controls_matches_nothing(data):
    assert [len(rows) for rows in matching_controls(POOL, POOL.iloc[[3]], data)] == [0] * 5


def test_references_are_matching_controls_drawn_by_seed(data):
    samples = pd.concat([table(("s3", "liver", "f", "drug", 1.0))] * 50)
    chosen = choose_references(samples, POOL, data, seed=0)
    assert set(chosen) == {0, 1, 2}
    assert np.array_equal(chosen, choose_references(samples, POOL, data, seed=0))
    assert not np.array_equal(chosen, choose_references(samples, POOL, data, seed=1))


def test_there_are_no_references_if_one_sample_has_no_control(data):
    samples = table(("s1", "liver", "f", "drug", 1.0), ("s1", "heart", "f", "drug", 1.0))
    assert choose_references(samples, POOL, data, seed=0) is None


def test_keys_of_samples_are_texts_with_a_mark_for_missing_values(data):
    groups = SampleGroups(table((None, "liver", "f", "drug", 1.0)), data)
    assert groups.context.tolist() == ["liver"] and groups.study.tolist() == ["?"]
    assert groups.study_context.tolist() == ["liver / ?"]
    assert groups.treatment.tolist() == ["drug / 1"]
    assert groups.condition.tolist() == ["liver / drug / 1"]
    assert groups.perturbation.tolist() == ["drug"] and groups.control.tolist() == [False]


def test_replicates_share_condition_and_study_or_the_condition_if_alone_in_a_study(data):
    samples = table(
        ("s1", "liver", "f", "drug", 1.0),
        ("s1", "liver", "m", "drug", 1.0),
        ("s2", "liver", "f", "drug", 1.0),
        ("s3", "liver", "f", "drug", 1.0),
        (None, "liver", "f", "drug", 1.0),
        (None, "liver", "f", "drug", 1.0),
        ("s1", "liver", "f", "drug", 2.0),
    )
    groups = pd.factorize(SampleGroups(samples, data).replicates)[0]
    assert groups.tolist() == [0, 0, 1, 1, 1, 1, 2]
    data = data.model_copy(update={"study_column": None})
    assert SampleGroups(samples, data).replicates.tolist() == [0, 0, 0, 0, 0, 0, 1]
