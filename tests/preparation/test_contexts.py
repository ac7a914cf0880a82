"""Held-out contexts: listed or drawn, with their controls in training."""

import numpy as np
import pandas as pd
import pytest
from support.designs import design, no_splits, timed_design

from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage

HELD_OUT = "test_context"


@pytest.fixture
def hold_out(declare):
    """(contexts held out, split, notes) of a cohort whose splits do not leak."""

    def assign(samples: pd.DataFrame, declared: dict | None = None, **changes):
        data = declare(**(declared or {}))
        split, notes = assign_splits(samples, data, no_splits(**changes))
        check_split_leakage(samples, split, data)
        return set(samples["tissue"][split == HELD_OUT]), split, notes

    return assign


def is_treated(samples: pd.DataFrame) -> pd.Series:
    return samples["perturbation"] != "control"


def reason(notes: list[str]) -> str:
    (note,) = [note for note in notes if note.startswith(f"{HELD_OUT} is absent: ")]
    return note


def without_controls(samples: pd.DataFrame, *tissues: str) -> pd.DataFrame:
    rows = samples["tissue"].isin(tissues) & ~is_treated(samples)
    return samples[~rows].reset_index(drop=True)


# listed contexts


def test_a_listed_context_keeps_its_controls_alone_in_training(hold_out):
    samples = design()
    test, split, notes = hold_out(samples, context=[{"tissue": "tissue1"}])
    assert test == {"tissue1"}
    own = samples["tissue"] == "tissue1"
    assert set(split[own & is_treated(samples)]) == {HELD_OUT}
    assert set(split[~own | ~is_treated(samples)]) == {TRAIN}
    assert not [note for note in notes if "perturbations that training lacks" in note]


def test_samples_of_a_missing_perturbation_in_a_held_out_context_do_not_train(hold_out):
    samples = design()
    samples.loc[samples.index % 7 == 0, "perturbation"] = None
    _, split, _ = hold_out(samples, context=[{"tissue": "tissue1"}])
    controls = samples["perturbation"] == "control"
    assert set(split[(samples["tissue"] == "tissue1") & ~controls]) == {HELD_OUT}


def test_a_mapping_of_one_of_two_context_columns_lists_all_its_contexts(hold_out):
    samples = design(tissues=4)
    samples["organ"] = np.where(samples["tissue"].isin(["tissue0", "tissue1"]), "lung", "blood")
    columns = {"context_columns": ["organ", "tissue"]}
    test, _, _ = hold_out(samples, columns, context=[{"organ": "lung"}])
    assert test == {"tissue0", "tissue1"}


@pytest.mark.parametrize("seed", range(4))
def test_a_held_out_context_is_no_part_of_any_other_held_out_entity_but_studies(hold_out, seed):
    samples = design(tissues=5, perturbations=10)
    shares = {"combination": 0.1, "validation_combination": 0.1, "test_random": 0.1}
    shares |= {"study": 0.1, "perturbation": 0.1, "validation": 0.1, "test_control": 0.2}
    _, split, _ = hold_out(samples, seed=seed, context=[{"tissue": "tissue2"}], **shares)
    rows = (samples["tissue"] == "tissue2") & is_treated(samples)
    assert set(split[rows]) == {HELD_OUT, "test_study", "test_perturbation"}


def test_perturbations_that_no_other_context_has_are_noted(hold_out):
    samples = design(studies=1, repeats=1)
    other = (samples["tissue"] != "tissue1") & (samples["perturbation"] == "drug3")
    samples = samples[~other].reset_index(drop=True)
    test, _, notes = hold_out(samples, context=[{"tissue": "tissue1"}])
    assert test == {"tissue1"}
    note = "1 of 8 samples of test_context have perturbations that training lacks: drug3"
    assert note in notes


def test_an_empty_list_holds_out_no_context(hold_out):
    test, _, notes = hold_out(design(), context=[])
    assert not test and reason(notes).endswith("the list of contexts is empty")


# drawn contexts


@pytest.mark.parametrize("seed", range(4))
def test_a_share_draws_whole_contexts_and_training_keeps_their_perturbations(hold_out, seed):
    samples = design(tissues=8)
    test, split, notes = hold_out(samples, seed=seed, context=0.25, test_random=0.2)
    assert len(test) == 2
    rows = samples["tissue"].isin(test)
    assert set(split[rows & is_treated(samples)]) == {HELD_OUT}
    assert set(samples["perturbation"][split == HELD_OUT]) <= set(
        samples["perturbation"][split == TRAIN]
    )
    assert not [note for note in notes if "perturbations that training lacks" in note]


def test_other_seeds_draw_other_contexts(hold_out):
    drawn = {frozenset(hold_out(design(tissues=8), seed=seed, context=0.2)[0]) for seed in range(5)}
    assert len(drawn) > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_context_without_controls_is_not_drawn_and_noted(hold_out, seed):
    samples = without_controls(design(tissues=4), "tissue0", "tissue1")
    test, _, notes = hold_out(samples, seed=seed, context=0.5)
    assert test == {"tissue2", "tissue3"}
    note = "no control in training, so not in test_context: contexts tissue0, tissue1"
    assert note in notes


@pytest.mark.parametrize("seed", range(4))
def test_drawn_contexts_leave_alone_what_the_lists_name(hold_out, seed):
    samples = design(tissues=4)
    pair = {"tissue": "tissue0", "perturbation": "drug1"}
    test, split, _ = hold_out(samples, seed=seed, context=0.5, combination=[pair])
    assert len(test) == 2 and "tissue0" not in test
    assert (split == "test_combination").sum() == 20


@pytest.mark.parametrize("seed", range(6))
def test_a_context_with_the_only_samples_of_a_perturbation_is_not_drawn(hold_out, seed):
    samples = design(tissues=3)
    other = (samples["tissue"] != "tissue1") & (samples["perturbation"] == "drug3")
    test, _, _ = hold_out(samples[~other].reset_index(drop=True), seed=seed, context=0.4)
    assert len(test) == 1 and "tissue1" not in test


@pytest.mark.parametrize(
    ("samples", "declared", "text"),
    [
        (design(tissues=1), {}, "a share of 0.5 of 1 contexts selects none, or each lacks"),
        (design(), {"context_columns": []}, "data.context_columns is empty"),
        (design(), {"control": None}, "data.control is null"),
    ],
    ids=["one context", "no columns", "no control"],
)
def test_absent_contexts_have_a_reason(hold_out, samples, declared, text):
    test, _, notes = hold_out(samples, declared, context=0.5)
    assert not test and text in reason(notes)


@pytest.mark.parametrize("seed", range(3))
def test_all_kinds_of_entities_are_held_out_together(declare, seed):
    samples = timed_design(tissues=6, drugs=12).assign(study="s", study_date="2020")
    covariates = {"perturbation": {"kind": "categorical"}, "time": {"kind": "numeric"}}
    covariates["time"]["scale"] = "log"
    groups = {"technical": {}, "biological": {}, "perturbation": covariates}
    names = ("combination", "validation_combination", "condition", "perturbation", "test_random")
    params = no_splits(seed=seed, context=0.2, test_control=0.2, **dict.fromkeys(names, 0.1))
    split, _ = assign_splits(samples, declare(covariates=groups), params)
    check_split_leakage(samples, split, declare(covariates=groups))
    tests = {"test_combination", "test_condition", "test_context", "test_perturbation"}
    assert tests <= set(split)


# invalid lists


def problems_of(samples: pd.DataFrame, data, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        assign_splits(samples, data, no_splits(**changes))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (
            [{"perturbation": "drug1"}],
            "here: splits.context.0: perturbation does not define contexts; expected columns of "
            "data.context_columns; known: tissue",
        ),
        ([{"tissue": "tissue11"}], "no sample has tissue = tissue11; did you mean tissue1"),
        (
            [{"tissue": f"tissue{number}"} for number in range(3)],
            "here: splits.context: no treated sample is left for training; hold out fewer contexts",
        ),
    ],
    ids=["another column", "unknown value", "every context"],
)
def test_an_invalid_list_is_refused_with_the_reason(declare, listed, message):
    problems = problems_of(design(), declare(), context=listed)
    assert any(message in problem for problem in problems)


def test_a_context_of_controls_alone_is_refused(declare):
    samples = design()
    samples = samples[(samples["tissue"] != "tissue1") | ~is_treated(samples)]
    (problem,) = problems_of(samples, declare(), context=[{"tissue": "tissue1"}])
    assert "only controls have tissue = tissue1; list a context with treated samples" in problem


def test_a_listed_context_without_controls_is_refused_with_the_reason(declare):
    samples = without_controls(design(), "tissue1")
    (problem,) = problems_of(samples, declare(), context=[{"tissue": "tissue1"}])
    assert problem == (
        "here: splits.context: training has no control of the context tissue1, and a new context "
        "is known by its controls alone; leave it out, or hold out some of its pairs by "
        "splits.combination"
    )


def test_controls_of_held_out_studies_do_not_count(declare):
    samples = design(studies=4)
    early = (samples["study"] != "study0") & (samples["tissue"] == "tissue1")
    samples = samples[~(early & ~is_treated(samples))]
    listed = [{"tissue": "tissue1"}]
    assert (
        "no control of the context tissue1"
        in problems_of(samples, declare(), context=listed, study=0.25)[0]
    )


def test_all_problems_are_reported_at_once(declare):
    samples = without_controls(design(), "tissue1")
    pairs = [{"perturbation": "drug0"}]
    problems = problems_of(samples, declare(), context=[{"tissue": "tissue1"}], combination=pairs)
    for message in ("no control of the context tissue1", "no other context of the perturbation"):
        assert any(message in problem for problem in problems)


def test_contexts_cannot_be_listed_without_a_declared_control(declare):
    (problem,) = problems_of(design(), declare(control=None), context=[{"tissue": "tissue1"}])
    assert "data.control is null" in problem and problem.endswith("or list no contexts")


# leakage


def test_a_treated_sample_of_a_held_out_context_in_validation_is_refused(declare):
    samples = design()
    split, _ = assign_splits(samples, declare(), no_splits(context=[{"tissue": "tissue1"}]))
    split[split[split == HELD_OUT].index[0]] = "validation"
    message = "test_context leaks: tissue1 also in training or validation"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, declare())


def test_a_held_out_context_whose_controls_do_not_train_is_refused(declare):
    samples = design()
    split, _ = assign_splits(samples, declare(), no_splits(context=[{"tissue": "tissue1"}]))
    split[(samples["tissue"] == "tissue1") & ~is_treated(samples)] = "test_control"
    message = "test_context holds out the context tissue1, of which training has no control"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, declare())
