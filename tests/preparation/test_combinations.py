"""Pairs that params.yaml names are held out whole, both parts seen apart; one that cannot be is refused with the reason."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import audit_entities

NONE = {
    "seed": 7,
    "validation": 0.0,
    "test_random": 0.0,
    "test_control": 0.0,
    "combination": 0.0,
    "validation_combination": 0.0,
    "perturbation": 0.0,
    "study": 0.0,
}


@pytest.fixture
def declare(params):
    def with_changes(**changes) -> Data:
        values = params.data.model_dump(mode="json")
        values |= {
            "source": "here",
            "context_columns": ["line"],
            "covariates": {"technical": {}, "biological": {}, "perturbation": {}},
            "date_column": None,
        }
        return Data.model_validate(values | changes)

    return with_changes


def splits(**changes) -> Splits:
    return Splits.model_validate(NONE | changes)


def cohort(lines: int = 4, drugs: int = 1, studies: int = 1, repeats: int = 1) -> pd.DataFrame:
    """Every study measures every line with every drug and untreated."""
    names = ["control", *(f"drug{number}" for number in range(drugs))]
    rows = [
        (f"study{s}", f"line{line}", name, "blood")
        for s in range(studies)
        for line in range(lines)
        for name in names
        for _ in range(repeats)
    ]
    table = pd.DataFrame(rows, columns=["study", "line", "perturbation", "tissue"])
    table.insert(0, "sample_id", [f"s{number:04d}" for number in range(len(table))])
    return table


def in_split(samples: pd.DataFrame, split: pd.Series, name: str) -> set[tuple[str, str]]:
    return set(samples[split == name][["line", "perturbation"]].itertuples(index=False, name=None))


def refused(samples: pd.DataFrame, data: Data, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        assign_splits(samples, data, splits(**changes))
    return list(caught.value.problems)


# what is held out


def test_eight_samples_hold_out_the_pair_that_is_named_and_train_on_the_seven_others(declare):
    samples = cohort()
    split, notes = assign_splits(
        samples, declare(), splits(combination=[{"line": "line2", "perturbation": "drug0"}])
    )
    assert (
        in_split(samples, split, "test_combination") == {("line2", "drug0")}
        and (split == TRAIN).sum() == 7
    )
    audit_entities(samples, split, declare())
    assert (
        "validation_combination is absent: of 4 pairs of context and perturbation a share of 0.0 is none, or none is left with both seen apart"
        in notes
    )


def test_every_sample_of_every_named_pair_is_held_out_whatever_the_seed(declare):
    samples = cohort(lines=5, drugs=4, studies=3, repeats=2)
    named = [{"line": "line1", "perturbation": "drug0"}, {"perturbation": "drug3", "line": "line4"}]
    for seed in range(5):
        split, _ = assign_splits(
            samples,
            declare(),
            splits(
                seed=seed,
                combination=named,
                validation_combination=[{"line": "line0", "perturbation": "drug1"}],
            ),
        )
        assert (
            in_split(samples, split, "test_combination") == {("line1", "drug0"), ("line4", "drug3")}
            and (split == "test_combination").sum() == 12
        )
        assert (
            in_split(samples, split, "validation_combination") == {("line0", "drug1")}
            and (split == "validation_combination").sum() == 6
        )
        audit_entities(samples, split, declare())


def test_a_mapping_without_the_perturbation_names_every_treated_sample_and_no_control(declare):
    samples = cohort(drugs=3)
    split, _ = assign_splits(samples, declare(), splits(combination=[{"line": "line2"}]))
    assert in_split(samples, split, "test_combination") == {
        ("line2", f"drug{number}") for number in range(3)
    }
    assert ("line2", "control") in in_split(samples, split, TRAIN)
    audit_entities(samples, split, declare())


def test_a_mapping_of_one_context_column_of_two_names_the_pairs_of_all_others(declare):
    samples = cohort(lines=4, drugs=2)
    samples["tissue"] = np.where(samples["line"].isin(["line0", "line1"]), "lung", "blood")
    data = declare(context_columns=["tissue", "line"])
    split, _ = assign_splits(
        samples, data, splits(combination=[{"tissue": "lung", "perturbation": "drug1"}])
    )
    assert in_split(samples, split, "test_combination") == {("line0", "drug1"), ("line1", "drug1")}


def test_a_share_for_validation_is_drawn_beside_named_pairs_and_leaves_both_parts_seen_apart(
    declare,
):
    samples = cohort(lines=4, drugs=3)
    named = [{"line": "line0", "perturbation": "drug0"}]
    drawn = set()
    for seed in range(8):
        split, _ = assign_splits(
            samples, declare(), splits(seed=seed, combination=named, validation_combination=0.25)
        )
        assert in_split(samples, split, "test_combination") == {("line0", "drug0")}
        validation = in_split(samples, split, "validation_combination")
        assert len(validation) == 3
        drawn |= validation
        audit_entities(samples, split, declare())
    assert len(drawn) > 3


def test_a_share_for_the_test_leaves_named_validation_pairs_alone(declare):
    samples = cohort(lines=4, drugs=3)
    split, _ = assign_splits(
        samples,
        declare(),
        splits(
            combination=0.25, validation_combination=[{"line": "line3", "perturbation": "drug2"}]
        ),
    )
    assert (
        in_split(samples, split, "validation_combination") == {("line3", "drug2")}
        and len(in_split(samples, split, "test_combination")) == 3
    )
    audit_entities(samples, split, declare())


def test_two_shares_are_those_of_the_parameters(declare):
    samples = cohort(lines=5, drugs=8)
    split, _ = assign_splits(
        samples, declare(), splits(combination=0.2, validation_combination=0.1)
    )
    assert (
        len(in_split(samples, split, "test_combination")) == 8
        and len(in_split(samples, split, "validation_combination")) == 4
    )


def test_where_few_pairs_can_be_held_out_test_and_validation_share_them(declare):
    samples = cohort(lines=3, drugs=1)
    split, _ = assign_splits(
        samples, declare(), splits(combination=0.5, validation_combination=0.5)
    )
    assert (
        len(in_split(samples, split, "test_combination"))
        == len(in_split(samples, split, "validation_combination"))
        == 1
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_perturbation_of_a_named_pair_is_not_drawn_to_be_held_out_whole(declare, seed):
    samples = cohort(lines=4, drugs=4)
    split, _ = assign_splits(
        samples,
        declare(),
        splits(
            seed=seed, perturbation=0.5, combination=[{"line": "line1", "perturbation": "drug2"}]
        ),
    )
    assert in_split(samples, split, "test_combination") == {("line1", "drug2")}
    assert (split == "test_perturbation").any() and ("line0", "drug2") in in_split(
        samples, split, TRAIN
    )
    audit_entities(samples, split, declare())


def test_samples_of_a_named_pair_in_a_held_out_study_stay_there_and_it_is_said(declare):
    samples = cohort(lines=3, drugs=2, studies=4)
    split, notes = assign_splits(
        samples,
        declare(),
        splits(study=0.25, combination=[{"line": "line1", "perturbation": "drug0"}]),
    )
    audit_entities(samples, split, declare())
    pair = (samples["line"] == "line1") & (samples["perturbation"] == "drug0")
    assert split[pair].value_counts().to_dict() == {"test_combination": 3, "test_study": 1}
    assert (
        "1 samples of the pairs that splits names for test_combination are in test_study" in notes
    )


def test_an_empty_list_names_no_pair(declare):
    split, notes = assign_splits(cohort(), declare(), splits(combination=[]))
    assert set(split) == {TRAIN} and "test_combination is absent: no pair is named" in notes


# what is refused


MISTAKES = [
    (
        [{"lin": "line1", "perturbation": "drug0"}],
        "splits.combination.0: lin names no pair; expected columns of data.context_columns and data.control; did you mean line?",
    ),
    (
        [{"tissue": "blood"}],
        "tissue names no pair; expected columns of data.context_columns and data.control; known: line, perturbation",
    ),
    (
        [{"line": "line11", "perturbation": "drug0"}],
        "no sample has line = line11; did you mean line",
    ),
    (
        [{"line": "line1"}, {"line": "line2", "perturbation": "durg0"}],
        "splits.combination.1: no sample has perturbation = durg0; did you mean drug0?",
    ),
    (
        [{"line": "line1", "perturbation": "control"}],
        "only controls have line = line1 and perturbation = control",
    ),
    ([{"perturbation": "drug0"}], "training sees no other context of the perturbation drug0"),
    (
        [{"line": f"line{number}"} for number in range(4)],
        "training sees no other context of the perturbation drug0",
    ),
]


@pytest.mark.parametrize(
    ("named", "message"), MISTAKES, ids=[message[:60] for _, message in MISTAKES]
)
def test_a_pair_that_is_none_or_not_seen_apart_is_refused_with_the_reason(declare, named, message):
    assert any(message in problem for problem in refused(cohort(), declare(), combination=named))


def test_values_that_no_sample_has_together_name_nothing(declare):
    samples = cohort(drugs=2)
    samples = samples[~((samples["line"] == "line1") & (samples["perturbation"] == "drug1"))]
    found = refused(samples, declare(), combination=[{"line": "line1", "perturbation": "drug1"}])
    assert found == [
        "here: splits.combination.0: no sample has line = line1 and perturbation = drug1; name a pair of context and perturbation that was measured"
    ]


def test_a_context_that_is_left_without_controls_and_other_perturbations_is_refused(declare):
    samples = cohort(drugs=2)
    samples = samples[(samples["line"] != "line1") | (samples["perturbation"] == "drug1")]
    found = refused(samples, declare(), combination=[{"line": "line1", "perturbation": "drug1"}])
    assert (
        len(found) == 1
        and "training sees neither a control nor another perturbation of the context line1"
        in found[0]
    )


def test_a_pair_is_named_for_the_test_or_for_validation(declare):
    pair = [{"line": "line1", "perturbation": "drug0"}]
    assert (
        "both name line1 / drug0; a pair is held out once"
        in refused(cohort(), declare(), combination=pair, validation_combination=pair)[0]
    )


def test_without_a_control_no_pair_can_be_named(declare):
    assert (
        "data.control is null"
        in refused(cohort(), declare(control=None), combination=[{"line": "line1"}])[0]
    )


def test_every_wrong_mapping_is_told_at_once(declare):
    found = refused(
        cohort(),
        declare(),
        combination=[{"lin": "line1"}, {"line": "line9"}],
        validation_combination=[{"perturbation": "nothing"}],
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "splits.combination.0",
        "splits.combination.1",
        "splits.validation_combination.0",
    ]
