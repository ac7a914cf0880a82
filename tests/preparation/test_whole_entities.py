"""Held-out levels of a column (donors, doses, times), and studies and perturbations by name."""

from collections.abc import Callable

import pandas as pd
import pytest
from support.designs import NO_COVARIATES, VISIBLE, design, no_splits, timed_design

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage

LEVEL = "test_level"
NO_STUDY = {"study_column": None, "date_column": None}


@pytest.fixture
def hold_out(declare):
    """(split, notes) of a cohort whose splits do not leak."""

    def assign(samples: pd.DataFrame, declared: dict, **changes):
        data = declare(**declared)
        cleaned = clean_samples(LabelForm.of(data).table(samples), data.covariates, "here")
        split, notes = assign_splits(cleaned, data, no_splits(**changes))
        check_split_leakage(cleaned, split, data)
        return split, notes

    return assign


def donors(number: int = 6, **changes) -> pd.DataFrame:
    """A design with a donor per study, who is no context."""
    return design(studies=number, **changes).rename(columns={"study": "donor"})


def treated(samples: pd.DataFrame) -> pd.Series:
    return samples["perturbation"] != "control"


def reason(notes: list[str], name: str) -> str:
    (note,) = [note for note in notes if note.startswith(f"{name} is absent: ")]
    return note


# levels

DONORS = NO_STUDY | {"level_column": "donor"}


def test_listed_donors_are_held_out_with_their_controls(hold_out):
    samples = donors()
    listed = [{"donor": "study1"}, {"donor": "study4"}]
    split, _ = hold_out(samples, DONORS, level=listed, test_random=0.2, test_control=0.2)
    inside = samples["donor"].isin(["study1", "study4"])
    assert ((split == LEVEL) == inside).all()
    assert {"test_random", "test_control", TRAIN} <= set(split)


def test_the_donor_may_be_the_context(hold_out):
    samples = design()
    declared = {"level_column": "tissue", "context_columns": ["tissue"]}
    split, _ = hold_out(samples, declared, level=[{"tissue": "tissue2"}])
    assert ((split == LEVEL) == (samples["tissue"] == "tissue2")).all()


@pytest.mark.parametrize("listed", ["72 hours", "3 d"])
def test_a_listed_time_holds_out_all_its_samples_in_any_unit(hold_out, listed):
    samples = timed_design(times=("24 h", "3 days"))
    covariates = {"time": {"kind": "numeric", "scale": "log"}}
    declared = NO_STUDY | {"level_column": "time"}
    declared |= {"covariates": NO_COVARIATES | {"perturbation": covariates}}
    split, _ = hold_out(samples, declared, level=[{"time": listed}])
    assert ((split == LEVEL) == (samples["time"] == "3 days")).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_share_draws_whole_levels_and_training_keeps_their_perturbations(hold_out, seed):
    samples = donors(8)
    split, notes = hold_out(samples, DONORS, seed=seed, level=0.25, perturbation=0.2)
    drawn = set(samples["donor"][split == LEVEL])
    assert len(drawn) == 2
    assert set(split[samples["donor"].isin(drawn)]) == {LEVEL}
    assert not [note for note in notes if "that training lacks" in note and "drug" not in note]


def test_other_seeds_draw_other_levels(hold_out):
    drawn = set()
    for seed in range(5):
        split, _ = hold_out(donors(8), DONORS, seed=seed, level=0.2)
        drawn.add(frozenset(donors(8)["donor"][split == LEVEL]))
    assert len(drawn) > 1


@pytest.mark.parametrize("seed", range(6))
def test_a_level_with_the_only_samples_of_a_perturbation_is_not_drawn(hold_out, seed):
    samples = donors(3)
    other = (samples["donor"] != "study1") & (samples["perturbation"] == "drug3")
    samples = samples[~other].reset_index(drop=True)
    split, _ = hold_out(samples, DONORS, seed=seed, level=0.4)
    assert len(set(samples["donor"][split == LEVEL]) - {"study1"}) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_level_of_all_controls_is_not_drawn(hold_out, seed):
    samples = timed_design(times=(6, 24, 72)).astype({"time": str})
    samples.loc[~treated(samples), "time"] = "0"
    declared = NO_STUDY | {"level_column": "time"}
    split, _ = hold_out(samples, declared, seed=seed, level=0.5)
    assert len(set(samples["time"][split == LEVEL])) == 2
    assert (split[~treated(samples)] == TRAIN).all()
    mixed = samples.assign(time=samples["time"].where(treated(samples), "24"))
    split, _ = hold_out(mixed, declared, seed=seed, level=0.5)
    assert "24" not in set(mixed["time"][split == LEVEL])


@pytest.mark.parametrize("seed", range(4))
def test_drawn_levels_leave_alone_what_the_lists_name(hold_out, seed):
    samples = donors(4)
    declared = DONORS | {"context_columns": ["donor"]}
    pair = {"donor": "study0", "perturbation": "drug1"}
    split, _ = hold_out(samples, declared, seed=seed, level=0.5, combination=[pair])
    assert "study0" not in set(samples["donor"][split == LEVEL])
    assert (split == "test_combination").sum() == 6
    split, _ = hold_out(samples, declared, seed=seed, level=0.5, context=[{"donor": "study0"}])
    assert "study0" not in set(samples["donor"][split == LEVEL])


def test_levels_go_before_all_entities_but_studies(hold_out):
    samples = design().assign(donor=lambda table: "d" + table["tissue"].str[-1])
    shares = dict.fromkeys(("study", "perturbation", "combination", "context"), 0.2)
    declared = {"level_column": "donor"}
    split, _ = hold_out(samples, declared, level=[{"donor": "d1"}], **shares)
    assert set(split[samples["donor"] == "d1"]) == {LEVEL, "test_study"}


def test_a_level_of_a_set_holds_out_every_sample_with_it(declare, hold_out):
    samples = donors().assign(line=["a", "a|b", "b"] * (6 * 3 * 9 * 2 // 3))
    covariates = NO_COVARIATES | {"biological": {"line": {"kind": "multilabel"}}}
    declared = NO_STUDY | {"level_column": "line", "covariates": covariates}
    split, _ = hold_out(samples, declared, level=[{"line": "a"}])
    assert ((split == LEVEL) == samples["line"].isin(["a", "a|b"])).all()
    split[samples["line"] == "a|b"] = TRAIN
    with pytest.raises(IntegrityError, match=r"test_level leaks: a\|b also in training"):
        check_split_leakage(samples, split, declare(**declared))


def test_samples_without_a_level_are_never_held_out(hold_out):
    samples = donors()
    samples.loc[samples.index % 3 == 0, "donor"] = None
    split, _ = hold_out(samples, DONORS, level=0.5)
    assert samples["donor"][split == LEVEL].notna().all() and (split == LEVEL).any()


def test_levels_need_no_control(hold_out):
    samples = donors(control=False)
    split, _ = hold_out(samples, DONORS | {"control": None}, level=[{"donor": "study3"}])
    assert ((split == LEVEL) == (samples["donor"] == "study3")).all()
    split, _ = hold_out(samples, DONORS | {"control": None}, level=0.34)
    assert samples["donor"][split == LEVEL].nunique() == 2


def test_new_perturbations_of_a_listed_level_are_noted(hold_out):
    samples = donors(3)
    other = (samples["donor"] != "study1") & (samples["perturbation"] == "drug3")
    samples = samples[~other].reset_index(drop=True)
    _, notes = hold_out(samples, DONORS, level=[{"donor": "study1"}])
    assert "6 of 54 samples of test_level have perturbations that training lacks: drug3" in notes


def test_absent_levels_have_a_reason(hold_out):
    _, notes = hold_out(donors(), NO_STUDY, level=0.3)
    assert reason(notes, LEVEL).endswith("data.level_column is null")
    _, notes = hold_out(donors(1), DONORS, level=0.3)
    assert "a share of 0.3 of 1 levels of donor selects none" in reason(notes, LEVEL)
    _, notes = hold_out(donors(), DONORS, level=[])
    assert reason(notes, LEVEL).endswith("the list of levels is empty")


@pytest.mark.parametrize("leak", [TRAIN, "validation"])
def test_a_visible_sample_of_a_held_out_level_is_refused(declare, leak):
    samples, data = donors(), declare(**DONORS)
    split, _ = assign_splits(samples, data, no_splits(level=[{"donor": "study2"}]))
    split[split[split == LEVEL].index[0]] = leak
    message = "test_level leaks: study2 also in training or validation"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, data)


def test_perturbations_are_no_levels(declare):
    with pytest.raises(ValueError, match="hold out perturbations by"):
        declare(level_column="perturbation")


# studies and perturbations by name


def test_listed_studies_are_the_test_and_no_study_validates(hold_out):
    samples = design()
    listed = [{"study": "study7"}, {"study": "study2"}]
    split, notes = hold_out(samples, {}, study=listed, perturbation=0.2)
    assert ((split == "test_study") == samples["study"].isin(["study2", "study7"])).all()
    text = "a list of studies names those of the test alone"
    assert reason(notes, "validation_study").endswith(text)


def test_listed_perturbations_are_the_test_and_none_validates(hold_out):
    samples = design()
    listed = [{"perturbation": "drug3"}]
    split, notes = hold_out(samples, {}, perturbation=listed, study=0.2, combination=0.2)
    inside = (samples["perturbation"] == "drug3") & ~split.isin(["test_study"])
    assert ((split == "test_perturbation") == inside).all()
    assert "validation_perturbation" not in set(split)
    assert "those of the test alone" in reason(notes, "validation_perturbation")
    number = int(((samples["perturbation"] == "drug3") & (split == "test_study")).sum())
    text = f"{number} samples of the perturbations listed for test_perturbation are in test_study"
    assert text in notes


def test_a_listed_perturbation_is_held_out_of_sets_too(hold_out):
    samples = design()
    samples["perturbation"] = samples["perturbation"].replace({"drug0": "drug1|drug2"})
    covariates = NO_COVARIATES | {"perturbation": {"perturbation": {"kind": "multilabel"}}}
    listed = [{"perturbation": "drug2"}]
    split, _ = hold_out(samples, {"covariates": covariates}, perturbation=listed)
    inside = samples["perturbation"].isin(["drug2", "drug1|drug2"])
    assert ((split == "test_perturbation") == inside).all()


# invalid lists


def problems_of(samples: pd.DataFrame, data: Data, **changes) -> list[str]:
    with pytest.raises(InputError) as caught:
        assign_splits(samples, data, no_splits(**changes))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("declared", "changes", "message"),
    [
        (
            {"study_column": None},
            {"study": [{"study": "study1"}]},
            "here: splits.study.0: data.study_column is null; name the column, or list no studies",
        ),
        ({}, {"level": [{"tissue": "tissue1"}]}, "splits.level.0: data.level_column is null"),
        ({}, {"study": [{"study": "study11"}]}, "no sample has study = study11; did you mean"),
        (
            {},
            {"study": [{"tissue": "tissue1"}]},
            "tissue does not define studies; expected columns of data.study_column; known: study",
        ),
        (
            {"level_column": "tissue"},
            {"level": [{"study": "study1"}]},
            "study does not define levels; expected columns of data.level_column; known: tissue",
        ),
        (
            {},
            {"perturbation": [{"perturbation": "control"}]},
            "only controls have perturbation = control; list a measured perturbation",
        ),
        (
            {"control": None},
            {"perturbation": [{"perturbation": "drug1"}]},
            "data.control is null, so no sample counts as treated",
        ),
        (
            {},
            {"perturbation": [{"perturbation": f"drug{number}"} for number in range(8)]},
            "here: splits.perturbation: no treated sample is left for training; hold out fewer "
            "perturbations",
        ),
        (
            {"level_column": "tissue"},
            {
                "level": [{"tissue": "tissue0"}, {"tissue": "tissue1"}, {"tissue": "tissue2"}],
                "study": [{"study": "study1"}],
            },
            "here: splits.level, splits.study: no treated sample is left for training; hold out "
            "fewer levels or studies",
        ),
        (
            {},
            {
                "perturbation": [{"perturbation": "drug1"}],
                "combination": [{"tissue": "tissue0", "perturbation": "drug1"}],
            },
            "training has no other context of the perturbation drug1",
        ),
    ],
)
def test_an_invalid_list_is_refused_with_the_reason(
    declare: Callable[..., Data], declared, changes, message
):
    problems = problems_of(design(), declare(**declared), **changes)
    assert any(message in problem for problem in problems)


def test_a_level_of_controls_alone_is_refused(declare):
    samples = timed_design().astype({"time": str})
    samples.loc[~treated(samples), "time"] = "0"
    data = declare(**NO_STUDY, level_column="time")
    (problem,) = problems_of(samples, data, level=[{"time": "0"}])
    assert "only controls have time = 0; list a level with treated samples" in problem


@pytest.mark.parametrize("seed", range(3))
def test_all_kinds_are_held_out_together(hold_out, seed):
    samples = timed_design(tissues=6, drugs=12, times=(6, 24, 72, 96))
    samples["donor"] = [f"donor{number % 5}" for number in range(len(samples))]
    covariates = {"perturbation": {"kind": "categorical"}, "time": {"kind": "categorical"}}
    groups = NO_COVARIATES | {"perturbation": covariates}
    declared = NO_STUDY | DONORS | {"covariates": groups}
    names = ("combination", "validation_combination", "condition", "perturbation", "test_random")
    changes = {"level": 0.2, "context": 0.2, "test_control": 0.2, **dict.fromkeys(names, 0.1)}
    split, _ = hold_out(samples, declared, seed=seed, **changes)
    tests = {"test_combination", "test_condition", "test_context", "test_perturbation", LEVEL}
    assert tests <= set(split)
    assert not set(samples["donor"][split == LEVEL]) & set(samples["donor"][split.isin(VISIBLE)])
