"""Held-out pairs: listed or drawn, with both parts in training; invalid lists are refused."""

import numpy as np
import pandas as pd
import pytest
from support.designs import design, no_splits

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage


def cohort(tissues: int = 4, drugs: int = 1, studies: int = 1, repeats: int = 1) -> pd.DataFrame:
    return design(studies, tissues, drugs, repeats)


def pair(tissue: int, drug: int) -> dict[str, str]:
    return {"tissue": f"tissue{tissue}", "perturbation": f"drug{drug}"}


def pairs_in(samples: pd.DataFrame, split: pd.Series, name: str) -> set[tuple[str, str]]:
    rows = samples[split == name][["tissue", "perturbation"]]
    return set(rows.itertuples(index=False, name=None))


@pytest.fixture
def hold_out(declare):
    """(test pairs, validation pairs, split) of a cohort whose splits do not leak."""

    def assign(samples: pd.DataFrame, **changes):
        split, _ = assign_splits(samples, declare(), no_splits(**changes))
        check_split_leakage(samples, split, declare())
        test = pairs_in(samples, split, "test_combination")
        return test, pairs_in(samples, split, "validation_combination"), split

    return assign


# listed pairs


def test_a_listed_pair_of_eight_samples_leaves_seven_for_training(declare):
    params = no_splits(combination=[pair(2, 0)])
    split, notes = assign_splits(cohort(), declare(), params)
    assert pairs_in(cohort(), split, "test_combination") == {("tissue2", "drug0")}
    assert (split == TRAIN).sum() == 7
    reason = "a share of 0.0 of 4 pairs of context and perturbation selects none"
    assert any(f"validation_combination is absent: {reason}" in note for note in notes)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_of_every_listed_pair_is_held_out_for_any_seed(hold_out, seed):
    samples = cohort(tissues=5, drugs=4, studies=3, repeats=2)
    listed = {"combination": [pair(1, 0), pair(4, 3)], "validation_combination": [pair(0, 1)]}
    test, validation, split = hold_out(samples, seed=seed, **listed)
    assert test == {("tissue1", "drug0"), ("tissue4", "drug3")}
    assert validation == {("tissue0", "drug1")}
    assert (split == "test_combination").sum() == 12
    assert (split == "validation_combination").sum() == 6


def test_a_mapping_without_perturbation_lists_all_treated_samples_and_no_control(hold_out):
    samples = cohort(drugs=3)
    test, _, split = hold_out(samples, combination=[{"tissue": "tissue2"}])
    assert test == {("tissue2", f"drug{number}") for number in range(3)}
    assert ("tissue2", "control") in pairs_in(samples, split, TRAIN)


def test_a_mapping_of_one_of_two_context_columns_lists_the_pairs_of_the_other(declare):
    samples = cohort(tissues=4, drugs=2)
    in_lung = samples["tissue"].isin(["tissue0", "tissue1"])
    samples["organ"] = np.where(in_lung, "lung", "blood")
    params = no_splits(combination=[{"organ": "lung", "perturbation": "drug1"}])
    split, _ = assign_splits(samples, declare(context_columns=["organ", "tissue"]), params)
    expected = {("tissue0", "drug1"), ("tissue1", "drug1")}
    assert pairs_in(samples, split, "test_combination") == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_perturbation_of_a_listed_pair_is_not_held_out_whole(hold_out, seed):
    samples = cohort(tissues=4, drugs=4)
    test, _, split = hold_out(samples, seed=seed, perturbation=0.5, combination=[pair(1, 2)])
    assert test == {("tissue1", "drug2")}
    assert (split == "test_perturbation").any()
    assert ("tissue0", "drug2") in pairs_in(samples, split, TRAIN)


def test_samples_of_a_listed_pair_in_a_held_out_study_stay_there_with_a_note(declare):
    samples = cohort(tissues=3, drugs=2, studies=4)
    params = no_splits(study=0.25, combination=[pair(1, 0)])
    split, notes = assign_splits(samples, declare(), params)
    rows = (samples["tissue"] == "tissue1") & (samples["perturbation"] == "drug0")
    assert split[rows].value_counts().to_dict() == {"test_combination": 3, "test_study": 1}
    assert "1 samples of the pairs listed for test_combination are in test_study" in notes


def test_an_empty_list_holds_out_no_pair(declare):
    split, notes = assign_splits(cohort(), declare(), no_splits(combination=[]))
    assert set(split) == {TRAIN}
    assert "test_combination is absent: the list of pairs is empty" in notes


# drawn pairs


def test_pairs_drawn_for_validation_keep_the_parts_of_listed_pairs_in_training(hold_out):
    drawn = set()
    for seed in range(8):
        test, validation, _ = hold_out(
            cohort(drugs=3), seed=seed, combination=[pair(0, 0)], validation_combination=0.25
        )
        assert test == {("tissue0", "drug0")} and len(validation) == 3
        drawn |= validation
    assert len(drawn) > 3


def test_pairs_drawn_for_the_test_exclude_those_listed_for_validation(hold_out):
    test, validation, _ = hold_out(
        cohort(drugs=3), combination=0.25, validation_combination=[pair(3, 2)]
    )
    assert validation == {("tissue3", "drug2")} and len(test) == 3


@pytest.mark.parametrize(
    ("tissues", "drugs", "shares", "sizes"),
    [
        (5, 8, (0.2, 0.1), (8, 4)),
        (3, 1, (0.5, 0.5), (1, 1)),  # fewer than requested can be held out
    ],
)
def test_test_and_validation_divide_the_drawn_pairs_by_their_shares(
    hold_out, tissues, drugs, shares, sizes
):
    combination, validation_combination = shares
    test, validation, _ = hold_out(
        cohort(tissues, drugs),
        combination=combination,
        validation_combination=validation_combination,
    )
    assert (len(test), len(validation)) == sizes


# invalid lists


def problems_of(samples: pd.DataFrame, data, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        assign_splits(samples, data, no_splits(**changes))
    return list(caught.value.problems)


COLUMNS = "does not define pairs; expected columns of data.context_columns and data.control"
NO_OTHER_CONTEXT = "training has no other context of the perturbation drug0"
MISTAKES = [
    (
        [{"tisue": "tissue1", "perturbation": "drug0"}],
        f"splits.combination.0: tisue {COLUMNS}; did you mean tissue?",
    ),
    ([{"study_date": "2030-06-01"}], f"study_date {COLUMNS}; known: tissue, perturbation"),
    ([{"tissue": "tissue11"}], "no sample has tissue = tissue11; did you mean tissue"),
    (
        [pair(1, 0), {"tissue": "tissue2", "perturbation": "durg0"}],
        "splits.combination.1: no sample has perturbation = durg0; did you mean drug0?",
    ),
    (
        [{"tissue": "tissue1", "perturbation": "control"}],
        "only controls have tissue = tissue1 and perturbation = control",
    ),
    ([{"perturbation": "drug0"}], NO_OTHER_CONTEXT),
    ([{"tissue": f"tissue{number}"} for number in range(4)], NO_OTHER_CONTEXT),
]


@pytest.mark.parametrize(("listed", "message"), MISTAKES, ids=[text[:60] for _, text in MISTAKES])
def test_an_invalid_list_is_refused_with_the_reason(declare, listed, message):
    problems = problems_of(cohort(), declare(), combination=listed)
    assert any(message in problem for problem in problems)


def test_values_that_no_sample_combines_are_refused(declare):
    samples = cohort(drugs=2)
    in_pair = (samples["tissue"] == "tissue1") & (samples["perturbation"] == "drug1")
    assert problems_of(samples[~in_pair], declare(), combination=[pair(1, 1)]) == [
        "here: splits.combination.0: no sample has tissue = tissue1 and perturbation = drug1; "
        "list a measured pair of context and perturbation"
    ]


def test_a_pair_whose_context_has_no_other_sample_is_refused(declare):
    samples = cohort(drugs=2)
    samples = samples[(samples["tissue"] != "tissue1") | (samples["perturbation"] == "drug1")]
    (problem,) = problems_of(samples, declare(), combination=[pair(1, 1)])
    assert "neither a control nor another perturbation of the context tissue1" in problem


def test_a_pair_listed_for_test_and_validation_is_refused(declare):
    lists = {"combination": [pair(1, 0)], "validation_combination": [pair(1, 0)]}
    (problem,) = problems_of(cohort(), declare(), **lists)
    assert "both list tissue1 / drug0; hold out a pair once" in problem


def test_listed_pairs_without_a_control_are_refused(declare):
    data = declare(control=None)
    problems = problems_of(cohort(), data, combination=[{"tissue": "tissue1"}])
    assert "data.control is null" in problems[0]


def test_all_invalid_mappings_are_reported_at_once(declare):
    problems = problems_of(
        cohort(),
        declare(),
        combination=[{"tisue": "tissue1"}, {"tissue": "tissue9"}],
        validation_combination=[{"perturbation": "nothing"}],
    )
    assert [problem.split(": ")[1] for problem in problems] == [
        "splits.combination.0",
        "splits.combination.1",
        "splits.validation_combination.0",
    ]
