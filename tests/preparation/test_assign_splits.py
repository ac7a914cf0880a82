"""Split assignment: entities held out whole, shares, randomness, reasons for absent splits."""

import hashlib

import pandas as pd
import pytest
from support.designs import (
    ALL_SPLITS,
    NO_COVARIATES,
    VISIBLE,
    all_splits,
    design,
    entities_in,
)

from pipeline.gem.data.splits import TEST_CONTROL, TRAIN, contexts, is_control
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage

KINDS = ("study", "perturbation", "combination")
HELD_OUT = {
    kind: {f"test_{kind}", f"validation_{kind}"} for kind in KINDS
}  # the splits of each kind
OFF = {"test_condition", "test_context", "test_level"}  # tested in files of their own


def assign(samples, data, **changes) -> pd.Series:
    return assign_splits(samples, data, all_splits(**changes))[0]


# held-out entities


@pytest.mark.parametrize("seed", range(3))
def test_every_split_is_assigned_and_no_held_out_entity_is_visible(declare, seed):
    samples = design()
    split, notes = assign_splits(samples, declare(), all_splits(seed=seed))
    assert split.index.equals(samples.index) and set(split) == set(ALL_SPLITS) - OFF
    assert {note.split(" is absent: ")[0] for note in notes} == OFF
    for kind in KINDS:
        test = entities_in(samples, split, kind, f"test_{kind}")
        validation = entities_in(samples, split, kind, f"validation_{kind}")
        assert test and validation
        assert not test & entities_in(samples, split, kind, *VISIBLE)
        assert not validation & entities_in(samples, split, kind, TRAIN)


@pytest.mark.parametrize("seed", range(3))
def test_splits_of_the_tiny_cohort_do_not_leak(cohort, params, seed):
    samples, data = cohort.samples.drop(columns="split"), cohort.declared
    split, _ = assign_splits(samples, data, params.splits.model_copy(update={"seed": seed}))
    check_split_leakage(samples, split, data)
    pairs = contexts(samples, data) + " + " + samples["perturbation"].astype(object)
    visible = split.isin(VISIBLE) & ~is_control(samples, data)
    assert not set(pairs[split == "test_combination"]) & set(pairs[visible])


@pytest.mark.parametrize("seed", range(8))
def test_training_contains_both_parts_of_a_held_out_pair(declare, seed):
    """With few samples per pair, random splits could take the last one of a perturbation."""
    sparse = design(studies=6, repeats=1).sample(frac=0.25, random_state=seed)
    dense = design(studies=1, tissues=4, perturbations=12, repeats=1)
    large = {"combination": 0.3, "test_random": 0.4, "validation": 0.3}
    for samples, shares in ((sparse.reset_index(drop=True), {}), (dense, large)):
        split = assign(samples, declare(), seed=seed, perturbation=0.0, study=0.0, **shares)
        training = samples[split == TRAIN]
        held_out = samples[split.isin(HELD_OUT["combination"])]
        assert set(held_out["perturbation"]) <= set(training["perturbation"])
        assert set(held_out["tissue"]) <= set(training["tissue"])


@pytest.mark.parametrize("kind", ["multilabel", "embedding"])
@pytest.mark.parametrize("seed", range(4))
def test_a_held_out_perturbation_is_not_visible_in_a_combination(declare, kind, seed):
    samples = design()
    combinations = {"drug0": "drug1|drug2", "drug3": "drug4|drug1"}
    samples["perturbation"] = samples["perturbation"].replace(combinations)
    covariate = {"kind": kind} | ({"table": "drugs.parquet"} if kind == "embedding" else {})
    data = declare(covariates=NO_COVARIATES | {"perturbation": {"perturbation": covariate}})
    split = assign(samples, data, seed=seed)
    check_split_leakage(samples, split, data)
    labels = samples["perturbation"].str.split("|").map(set)
    for name, visible in (
        ("test_perturbation", split.isin(VISIBLE)),
        ("validation_perturbation", split == TRAIN),
    ):
        held_out = labels[split == name]
        assert len(held_out)
        assert not any(one <= other for one in held_out for other in labels[visible])


def test_missing_studies_and_perturbations_are_never_held_out(declare):
    samples = design()
    samples.loc[samples.index % 3 == 0, "study"] = None
    samples.loc[samples.index % 5 == 0, "perturbation"] = None
    split = assign(samples, declare())
    check_split_leakage(samples, split, declare())
    assert samples["study"][split.isin(HELD_OUT["study"])].notna().all()
    treated = split.isin(HELD_OUT["perturbation"] | HELD_OUT["combination"])
    assert samples["perturbation"][treated].notna().all()


@pytest.mark.parametrize(("seed", "digest"), [(1, "5a7939efdb07ea8f"), (7, "5f20b40d4f109e18")])
def test_kinds_that_are_off_leave_the_draws_of_the_others_as_they_were(declare, seed, digest):
    """The digests are older than these kinds: another order of draws would make earlier results
    incomparable."""
    split = assign(design(), declare(), seed=seed)
    assert hashlib.sha256("\n".join(split).encode()).hexdigest().startswith(digest)


# dates


def test_the_latest_studies_are_the_test_and_those_before_them_the_validation(declare):
    samples = design()  # study0 is the latest
    split = assign(samples, declare())
    assert entities_in(samples, split, "study", "test_study") == {"study0", "study1"}
    assert entities_in(samples, split, "study", "validation_study") == {"study2", "study3"}


MONTHS = pd.Series(pd.date_range("1999-12-01", periods=10, freq="MS"))
DATES = {
    "integers": pd.Series(range(5, 15)),
    "floats": pd.Series(range(5, 15)).astype(float),
    "nullable integers": pd.Series(range(5, 15)).astype("Int64"),
    "timestamps": MONTHS,
    "dates": MONTHS.dt.date,
    "text": MONTHS.dt.strftime("%Y-%m-%d"),
    "categorical text": MONTHS.dt.strftime("%Y-%m-%d").astype("category"),
}


@pytest.mark.parametrize("kind", DATES)
def test_dates_of_every_type_order_the_studies(declare, kind):
    samples = design()
    number = samples["study"].str.removeprefix("study").astype(int)
    samples["study_date"] = DATES[kind].reindex(number).set_axis(samples.index)
    split = assign(samples, declare())
    assert entities_in(samples, split, "study", "test_study") == {"study8", "study9"}


@pytest.mark.parametrize("missing", ["of a study", "of some samples"])
def test_missing_dates_do_not_make_a_study_the_latest(declare, missing):
    samples = design()
    rows = samples["study"] == "study9" if missing == "of a study" else samples.index % 2 == 0
    samples.loc[rows, "study_date"] = None
    split = assign(samples, declare())
    assert entities_in(samples, split, "study", "test_study") == {"study0", "study1"}


def test_without_dates_the_seed_draws_the_held_out_studies(declare):
    samples, data, drawn = design(), declare(date_column=None), set()
    for seed in range(6):
        split = assign(samples, data, seed=seed)
        studies = entities_in(samples, split, "study", "test_study")
        assert len(studies) == 2
        drawn.add(frozenset(studies))
    assert len(drawn) > 1


# randomness


def test_splits_are_determined_by_the_seed(declare):
    first, again, other = (assign(design(), declare(), seed=seed) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_splits_do_not_depend_on_order_index_and_categories_of_the_table(declare):
    samples = design()
    expected = assign(samples, declare()).set_axis(samples["sample_id"])
    shuffled = samples.sample(frac=1, random_state=1)
    split = assign(shuffled, declare()).set_axis(shuffled["sample_id"])
    assert split.sort_index().equals(expected.sort_index())
    for column in ("study", "perturbation", "tissue"):
        levels = [*sorted(samples[column].unique(), reverse=True), "unused"]
        categorical = samples.assign(**{column: pd.Categorical(samples[column], levels)})
        before = categorical.copy()
        assert assign(categorical, declare()).tolist() == expected.tolist()
        pd.testing.assert_frame_equal(categorical, before)


# shares


def test_shares_are_those_of_the_parameters(declare):
    samples = design(studies=20, perturbations=20)
    shares = {"study": 0.1, "perturbation": 0.1, "combination": 0.05}
    shares |= {"test_random": 0.2, "validation": 0.1, "test_control": 0.5}
    split = assign(samples, declare(), **shares)
    for kind, number in (("study", 2), ("perturbation", 2), ("combination", round(0.05 * 16 * 3))):
        for name in HELD_OUT[kind]:
            assert len(entities_in(samples, split, kind, name)) == number
    left = split.isin([TRAIN, "test_random", "validation"]).sum()
    assert (split == "test_random").sum() == round(0.2 * left)
    assert (split == "validation").sum() == round(0.1 * left)
    is_free = (samples["perturbation"] == "control") & ~split.isin(HELD_OUT["study"])
    for _, rows in samples[is_free].groupby("tissue"):
        assert (split[rows.index] == TEST_CONTROL).sum() == round(0.5 * len(rows))


def test_only_controls_are_reserved_and_none_is_held_out_as_a_pair_or_perturbation(declare):
    samples = design()
    split = assign(samples, declare())
    assert set(samples["perturbation"][split == TEST_CONTROL]) == {"control"}
    treated = split.isin(HELD_OUT["perturbation"] | HELD_OUT["combination"])
    assert "control" not in set(samples["perturbation"][treated])


# absent splits


def reasons(samples, data, **changes) -> dict[str, str]:
    """Split to the reason of its absence; every split is present or has a reason."""
    split, notes = assign_splits(samples, data, all_splits(**changes))
    check_split_leakage(samples, split, data)
    absent = dict(note.split(" is absent: ") for note in notes)
    assert set(absent) | set(split) == set(ALL_SPLITS) and not set(absent) & set(split)
    return absent


PAIRS, PERTURBATIONS = HELD_OUT["combination"], HELD_OUT["perturbation"]


@pytest.mark.parametrize(
    ("samples", "declared", "absent", "reason"),
    [
        ({"tissues": 1}, {}, PAIRS, {"test_combination": "of 8 pairs of context and perturbation"}),
        (
            {"perturbations": 1},
            {},
            PAIRS | PERTURBATIONS,
            {"test_perturbation": "1 perturbations besides the control"},
        ),
        (
            {"control": False},
            {"control": None},
            PAIRS | PERTURBATIONS | {TEST_CONTROL},
            dict.fromkeys((TEST_CONTROL, "test_perturbation", "test_combination"), "data.control"),
        ),
        ({}, {"study_column": None}, HELD_OUT["study"], {"test_study": "data.study_column"}),
    ],
    ids=["one context", "one perturbation", "no control", "no study column"],
)
def test_absent_splits_have_a_reason(declare, samples, declared, absent, reason):
    notes = reasons(design(**samples), declare(**declared))
    assert set(notes) - OFF == absent
    for name, text in reason.items():
        assert text in notes[name]


def test_a_share_of_zero_is_given_as_the_reason(declare):
    names = (*KINDS, "test_random", "validation", "test_control")
    notes = reasons(design(), declare(level_column="tissue"), **dict.fromkeys(names, 0.0))
    assert set(notes) == set(ALL_SPLITS) - {TRAIN}
    assert all("share of 0.0" in note for note in notes.values())


def test_eight_samples_of_one_study_leave_samples_for_training(declare):
    samples = design(studies=1, tissues=1, perturbations=1, repeats=4)
    assert set(reasons(samples, declare())) >= {"test_study", *PAIRS, *PERTURBATIONS}
    assert (assign(samples, declare()) == TRAIN).sum() >= 5


def test_perturbations_of_one_sample_each_can_be_held_out(declare):
    notes = reasons(design(studies=1, tissues=1, perturbations=30, repeats=1), declare())
    assert "test_perturbation" not in notes
    assert {"test_study", "test_combination", TEST_CONTROL} <= set(notes)
