"""Held-out conditions: listed or drawn, with context and perturbation in training."""

from collections.abc import Callable

import pandas as pd
import pytest
from support.designs import NO_COVARIATES, VISIBLE, no_splits, timed_design

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage

NUMERIC = {"kind": "numeric", "scale": "log"}
HELD_OUT = "test_condition"


@pytest.fixture
def timed(declare) -> Callable[..., Data]:
    """Declarations of `timed_design`; `time`: the declaration of that column."""

    def declare_timed(time: dict = NUMERIC, **changes) -> Data:
        covariates = {"perturbation": {"kind": "categorical"}, "time": time}
        values = {
            "covariates": NO_COVARIATES | {"perturbation": covariates},
            "study_column": None,
            "date_column": None,
        }
        return declare(**(values | changes))

    return declare_timed


@pytest.fixture
def hold_out(timed):
    """(conditions held out as (tissue, perturbation, time), split, notes) without leakage."""

    def assign(samples: pd.DataFrame, data: Data | None = None, **changes):
        data = data or timed()
        cleaned = clean_samples(LabelForm.of(data).table(samples), data.covariates, "here")
        split, notes = assign_splits(cleaned, data, no_splits(**changes))
        check_split_leakage(cleaned, split, data)
        return conditions_in(samples, split, HELD_OUT), split, notes

    return assign


def conditions_in(samples: pd.DataFrame, split: pd.Series, *splits: str) -> set[tuple]:
    rows = samples[split.isin(splits) & (samples["perturbation"] != "control")]
    return set(rows[["tissue", "perturbation", "time"]].itertuples(index=False, name=None))


def reason(notes: list[str]) -> str:
    (note,) = [note for note in notes if note.startswith(f"{HELD_OUT} is absent: ")]
    return note


# listed conditions

ONE = {"tissue": "tissue1", "perturbation": "drug0", "time": "24"}


def test_a_listed_condition_is_held_out_and_its_pair_stays_at_other_times(hold_out):
    samples = timed_design()
    test, split, _ = hold_out(samples, condition=[ONE])
    assert test == {("tissue1", "drug0", 24)} and (split == HELD_OUT).sum() == 2
    assert {("tissue1", "drug0", 6), ("tissue1", "drug0", 72)} <= conditions_in(
        samples, split, TRAIN
    )


@pytest.mark.parametrize("listed", ["72 hours", "3 days", "3d", "4320 min"])
@pytest.mark.parametrize(
    ("declaration", "times"),
    [
        (NUMERIC, ("24 h", "3 days")),
        (NUMERIC, ("1 day", "72h")),
        ({"kind": "quantity", "scale": "log", "unit": "h"}, (24, 72)),
        ({"kind": "quantity", "scale": "log", "unit": "any"}, ("1 day", "72 hours")),
    ],
)
def test_a_listed_time_holds_out_every_treated_sample_of_it_in_any_unit(
    hold_out, timed, listed, declaration, times
):
    samples = timed_design(times=times)
    test, split, _ = hold_out(samples, timed(declaration), condition=[{"time": listed}])
    treated = samples["perturbation"] != "control"
    at_time = samples["time"] == times[1]
    assert (split == HELD_OUT).tolist() == (treated & at_time).tolist()
    assert len(test) == 12


def test_labels_of_a_mapping_are_compared_as_labels(hold_out, timed):
    samples = timed_design(times=("2", "2.0"))
    data = timed({"kind": "categorical"})
    test, _, _ = hold_out(samples, data, condition=[{"time": "2.0"}])
    assert {time for _, _, time in test} == {"2.0"}


def test_a_mapping_may_match_samples_whose_context_is_partly_missing(hold_out):
    samples = timed_design()
    samples.loc[samples.index % 5 == 0, "tissue"] = None
    _, split, _ = hold_out(samples, condition=[{"time": "72"}])
    assert ((split == HELD_OUT) == ((samples["time"] == 72) & treated(samples))).all()


def treated(samples: pd.DataFrame) -> pd.Series:
    return samples["perturbation"] != "control"


@pytest.mark.parametrize("seed", range(4))
def test_a_perturbation_that_a_mapping_names_is_not_held_out_whole(hold_out, seed):
    test, split, _ = hold_out(timed_design(), seed=seed, perturbation=0.5, condition=[ONE])
    assert test == {("tissue1", "drug0", 24)}
    assert (split == "test_perturbation").any()


def test_a_listed_time_leaves_perturbations_to_be_held_out_with_a_note(hold_out):
    samples = timed_design()
    _, split, notes = hold_out(samples, perturbation=0.25, condition=[{"time": "72"}])
    at_time = split[treated(samples) & (samples["time"] == 72)].value_counts().to_dict()
    assert at_time == {HELD_OUT: 12, "test_perturbation": 6, "validation_perturbation": 6}
    for name in ("test_perturbation", "validation_perturbation"):
        assert f"6 samples of the conditions listed for {HELD_OUT} are in {name}" in notes


@pytest.mark.parametrize("seed", range(4))
def test_a_listed_time_and_drawn_pairs_share_a_cohort(hold_out, seed):
    samples = timed_design(tissues=4)
    shares = {"combination": 0.2, "validation_combination": 0.2}
    _, split, _ = hold_out(samples, seed=seed, condition=[{"time": "72"}], **shares)
    assert ((split == HELD_OUT) == (treated(samples) & (samples["time"] == 72))).all()
    assert {"test_combination", "validation_combination"} <= set(split)


def test_an_empty_list_holds_out_no_condition(hold_out):
    test, _, notes = hold_out(timed_design(), condition=[])
    assert not test and reason(notes).endswith("the list of conditions is empty")


# drawn conditions


@pytest.mark.parametrize("seed", range(4))
def test_a_share_draws_whole_conditions_whose_pair_stays_in_training(hold_out, seed):
    samples = timed_design()
    test, split, _ = hold_out(samples, seed=seed, condition=0.25)
    assert len(test) == 9  # of 36
    training = conditions_in(samples, split, *VISIBLE)
    assert not test & training
    assert {key[:2] for key in test} <= {key[:2] for key in training}


def test_other_seeds_draw_other_conditions(hold_out):
    drawn = {frozenset(hold_out(timed_design(), seed=seed, condition=0.1)[0]) for seed in range(5)}
    assert len(drawn) > 1


def test_no_condition_is_drawn_where_each_pair_has_one(hold_out):
    test, _, notes = hold_out(timed_design(times=(24,)), condition=0.5)
    assert not test
    assert "a share of 0.5 of 12 conditions selects none, or no pair" in reason(notes)


def test_without_a_control_no_condition_is_held_out(hold_out, timed):
    samples = timed_design()
    _, _, notes = hold_out(samples, timed(control=None), condition=0.5)
    assert reason(notes).endswith("data.control is null")


@pytest.mark.parametrize("seed", range(4))
def test_conditions_and_all_other_entities_are_held_out_together(hold_out, seed):
    samples = timed_design(tissues=5, drugs=10)
    shares = {"combination": 0.1, "validation_combination": 0.1, "perturbation": 0.1}
    shares |= {"condition": 0.1, "test_random": 0.1, "validation": 0.1, "test_control": 0.2}
    _, split, _ = hold_out(samples, seed=seed, **shares)
    assert {HELD_OUT, "test_combination", "validation_combination", "test_random"} <= set(split)


# invalid lists


def problems_of(samples: pd.DataFrame, data: Data, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        assign_splits(samples, data, no_splits(**changes))
    return list(caught.value.problems)


MISTAKES = [
    (
        [{"tme": "24"}],
        "here: splits.condition.0: tme does not define conditions; expected columns of "
        "data.context_columns, data.control and data.covariates.perturbation; did you mean time?",
    ),
    ([{"sample_id": "s00001"}], "sample_id does not define conditions"),
    ([ONE, {"time": "48"}], "splits.condition.1: no sample has time = 48; known: 24, 6, 72"),
    ([{"time": "soon"}], "no sample has time = soon"),
    (
        [{"perturbation": "control"}],
        "only controls have perturbation = control; list values that were measured together",
    ),
    (
        [{"perturbation": "drug0"}],
        "training has no other condition of the perturbation drug0; a condition needs both parts "
        "in training: hold out fewer conditions",
    ),
]


@pytest.mark.parametrize(("listed", "message"), MISTAKES, ids=[text[:60] for _, text in MISTAKES])
def test_an_invalid_list_is_refused_with_the_reason(timed, listed, message):
    problems = problems_of(timed_design(), timed(), condition=listed)
    assert any(message in problem for problem in problems)


def test_a_condition_whose_context_has_no_other_sample_is_refused(timed):
    samples = timed_design()
    alone = (samples["tissue"] == "tissue1") & (samples["perturbation"] != "drug0")
    (problem,) = problems_of(samples[~alone], timed(), condition=[{"tissue": "tissue1"}])
    assert "neither a control nor another perturbation of the context tissue1" in problem


def test_listed_pairs_and_conditions_may_not_empty_a_perturbation_together(timed):
    pairs = [{"tissue": f"tissue{number}", "perturbation": "drug0"} for number in (0, 1)]
    condition = [{"tissue": "tissue2", "perturbation": "drug0"}]
    assert no_splits(combination=pairs) and no_splits(condition=condition)
    problems = problems_of(timed_design(), timed(), combination=pairs, condition=condition)
    assert len(problems) == 2 and all("the perturbation drug0" in text for text in problems)


def test_mistakes_in_all_lists_are_reported_at_once(timed):
    problems = problems_of(
        timed_design(), timed(), combination=[{"tissue": "no"}], condition=[{"time": "1"}] * 2
    )
    assert [problem.split(": ")[1] for problem in problems] == [
        "splits.combination.0",
        "splits.condition.0",
        "splits.condition.1",
    ]


# leakage


def test_a_sample_of_a_held_out_condition_in_training_is_refused(timed):
    samples, data = timed_design(), timed()
    split, _ = assign_splits(samples, data, no_splits(condition=[ONE]))
    split[split[split == HELD_OUT].index[0]] = TRAIN
    message = "test_condition leaks: tissue1 / drug0 / 24 also in training or validation"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, data)


@pytest.mark.parametrize(("part", "value"), [("perturbation", "drug0"), ("tissue", "tissue1")])
def test_a_part_of_a_held_out_condition_that_training_lacks_is_refused(timed, part, value):
    samples, data = timed_design(), timed()
    split, _ = assign_splits(samples, data, no_splits(condition=[ONE]))
    split[(samples[part] == value) & (split == TRAIN)] = "test_random"
    name = "context" if part == "tissue" else part
    message = rf"test_condition holds out conditions of the {name} {value}, which is absent from"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, data)
