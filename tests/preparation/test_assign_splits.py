"""Splits: every sample in exactly one, nothing held out is seen, and what cannot be held out says why."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data, Splits
from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.data.splits import (
    ROLES,
    TEST_CONTROL,
    TESTS,
    TRAIN,
    VALIDATIONS,
    contexts,
    is_control,
    role_of,
    sizes,
    unreadable_dates,
)
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import (
    TELLING_GENES,
    audit_entities,
    audit_replicates,
    fingerprints,
)

ALL = (TRAIN, *VALIDATIONS, *TESTS, TEST_CONTROL)
VISIBLE = (TRAIN, *VALIDATIONS)


@pytest.fixture
def declare(params):
    """data of params.yaml for the columns of `design`, with changes."""

    def with_changes(**changes) -> Data:
        values = params.data.model_dump(mode="json")
        values |= {
            "context_columns": ["tissue"],
            "covariates": {"technical": {}, "biological": {}, "perturbation": {}},
        }
        return Data.model_validate(values | changes)

    return with_changes


def shares(**changes) -> Splits:
    values = {
        "seed": 7,
        "validation": 0.05,
        "test_random": 0.1,
        "test_control": 0.2,
        "combination": 0.1,
        "perturbation": 0.15,
        "study": 0.2,
    }
    values |= changes
    return Splits.model_validate({"validation_combination": values["combination"]} | values)


def design(
    studies: int = 10,
    tissues: int = 3,
    perturbations: int = 8,
    repeats: int = 2,
    control: bool = True,
) -> pd.DataFrame:
    """Every study sees every context and perturbation: `repeats` samples each. Studies are dated against their names."""
    names = (["control"] if control else []) + [f"drug{number}" for number in range(perturbations)]
    rows = [
        (f"study{study}", f"tissue{tissue}", name, f"{2030 - study}-06-01")
        for study in range(studies)
        for tissue in range(tissues)
        for name in names
        for _ in range(repeats)
    ]
    samples = pd.DataFrame(rows, columns=["study", "tissue", "perturbation", "study_date"])
    samples.insert(0, "sample_id", [f"s{number:05d}" for number in range(len(samples))])
    return samples


def entities(samples: pd.DataFrame, kind: str) -> pd.Series:
    """The names that test_<kind> holds out; missing for controls."""
    treated = samples["perturbation"].where(samples["perturbation"] != "control")
    return {
        "study": samples["study"],
        "perturbation": treated,
        "combination": samples["tissue"] + " + " + treated,
    }[kind]


def seen(samples: pd.DataFrame, split: pd.Series, kind: str, splits) -> set:
    return set(entities(samples, kind)[split.isin(list(splits))].dropna())


# what always holds


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_is_in_exactly_one_known_split(declare, seed):
    samples = design()
    split, notes = assign_splits(samples, declare(), shares(seed=seed))
    assert split.index.equals(samples.index) and set(split) == set(ALL) and notes == []


def test_every_split_has_exactly_one_role():
    assert sorted(split for splits in ROLES.values() for split in splits) == sorted(ALL)
    assert {split: role_of(split) for split in ALL} == {
        TRAIN: "train",
        **dict.fromkeys(VALIDATIONS, "validation"),
        **dict.fromkeys((*TESTS, TEST_CONTROL), "test"),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["study", "perturbation", "combination"])
def test_no_held_out_entity_is_visible_before_the_test_and_none_is_shared_with_validation(
    declare, kind, seed
):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares(seed=seed))
    test, validation = (
        seen(samples, split, kind, [f"test_{kind}"]),
        seen(samples, split, kind, [f"validation_{kind}"]),
    )
    assert test and validation
    assert not test & seen(samples, split, kind, VISIBLE)
    assert not validation & seen(samples, split, kind, [TRAIN])
    assert not test & validation


@pytest.mark.parametrize("seed", range(3))
def test_the_splits_of_the_tiny_cohort_pass_the_same_claims(cohort, params, seed):
    samples = cohort.samples.drop(columns="split")
    data = cohort.declared
    split, _ = assign_splits(samples, data, params.splits.model_copy(update={"seed": seed}))
    audit_entities(samples, split, data)
    pairs = contexts(samples, data) + " + " + samples["perturbation"]
    treated = ~is_control(samples, data)
    assert not set(pairs[split == "test_combination"]) & set(pairs[split.isin(VISIBLE) & treated])


@pytest.mark.parametrize("kind", ["test_combination", "validation_combination"])
@pytest.mark.parametrize("seed", range(8))
def test_the_parts_of_a_held_out_pair_are_seen_apart_in_training(declare, kind, seed):
    """Few samples a pair, so that random hold-outs could take the last one of a perturbation from training."""
    samples = design(studies=6, tissues=3, perturbations=8, repeats=1)
    samples = samples.sample(frac=0.25, random_state=seed).reset_index(drop=True)
    split, _ = assign_splits(samples, declare(), shares(seed=seed, perturbation=0.0, study=0.0))
    training = samples[split == TRAIN]
    held = samples[split == kind]
    assert set(held["perturbation"]) <= set(training["perturbation"])
    assert set(held["tissue"]) <= set(training["tissue"])


def test_the_parts_of_a_held_out_pair_are_seen_apart_even_with_large_random_shares(declare):
    samples = design(studies=1, tissues=4, perturbations=12, repeats=1)
    for seed in range(8):
        split, _ = assign_splits(
            samples,
            declare(),
            shares(
                seed=seed,
                perturbation=0.0,
                study=0.0,
                combination=0.3,
                test_random=0.4,
                validation=0.3,
            ),
        )
        training = samples[split == TRAIN]
        held = samples[split.isin(["test_combination", "validation_combination"])]
        assert set(held["perturbation"]) <= set(training["perturbation"]), f"seed {seed}"


def test_the_latest_studies_are_the_test_and_those_before_them_the_validation(declare):
    samples = design()  # study0 is the latest
    split, _ = assign_splits(samples, declare(), shares(study=0.2))
    assert seen(samples, split, "study", ["test_study"]) == {"study0", "study1"}
    assert seen(samples, split, "study", ["validation_study"]) == {"study2", "study3"}


@pytest.mark.parametrize(
    "dates",
    [
        pd.Series(range(5, 15)),
        pd.Series(range(5, 15)).astype(float),
        pd.Series(range(5, 15)).astype("Int64"),
        pd.Series(pd.date_range("1999-12-01", periods=10, freq="MS")),
        pd.Series(pd.date_range("1999-12-01", periods=10, freq="MS").date),
        pd.Series(pd.date_range("1999-12-01", periods=10, freq="MS").strftime("%Y-%m-%d")),
        pd.Series(pd.date_range("1999-12-01", periods=10, freq="MS").strftime("%Y-%m-%d")).astype(
            "category"
        ),
    ],
    ids=[
        "integers",
        "floats",
        "nullable integers",
        "timestamps",
        "dates",
        "text",
        "categorical text",
    ],
)
def test_dates_of_every_type_order_the_studies(declare, dates):
    samples = design()
    samples["study_date"] = dates.reindex(
        samples["study"].str.removeprefix("study").astype(int)
    ).set_axis(samples.index)
    split, _ = assign_splits(samples, declare(), shares(study=0.2))
    assert seen(samples, split, "study", ["test_study"]) == {"study8", "study9"}


def test_dates_that_cannot_be_ordered_are_named_with_their_rows():
    assert (
        unreadable_dates(
            pd.Series(["2014", "2014-06-01", None, "2014-06-01T10:00", "20140601"]), "x"
        )
        == []
    )
    found = unreadable_dates(pd.Series(["2014-06-01", "June 14", None, "June 14"]), "file: date")
    assert len(found) == 1 and found[0].startswith("file: date: 'June 14' is no date (rows 1, 3)")


def test_a_study_without_a_date_is_not_taken_for_the_latest(declare):
    samples = design()
    samples["study_date"] = samples["study_date"].where(samples["study"] != "study9")
    split, _ = assign_splits(samples, declare(), shares(study=0.2))
    assert seen(samples, split, "study", ["test_study"]) == {"study0", "study1"}


def test_a_study_dates_by_its_latest_sample_and_a_missing_date_beside_it_does_not_matter(declare):
    samples = design()
    samples.loc[samples.index % 2 == 0, "study_date"] = None
    split, _ = assign_splits(samples, declare(), shares(study=0.2))
    assert seen(samples, split, "study", ["test_study"]) == {"study0", "study1"}


def test_without_dates_the_held_out_studies_are_drawn_by_the_seed(declare):
    samples = design()
    drawn = {
        frozenset(
            seen(
                samples,
                assign_splits(samples, declare(date_column=None), shares(seed=seed))[0],
                "study",
                ["test_study"],
            )
        )
        for seed in range(6)
    }
    assert len(drawn) > 1 and all(len(studies) == 2 for studies in drawn)


# randomness


def test_the_same_seed_gives_the_same_splits_and_another_seed_others(declare):
    samples = design()
    one, again, other = (
        assign_splits(samples, declare(), shares(seed=seed))[0] for seed in (1, 1, 2)
    )
    assert one.equals(again) and not one.equals(other)


@pytest.mark.parametrize("kind", ["study", "perturbation", "combination"])
def test_held_out_entities_do_not_depend_on_the_order_of_the_rows(declare, kind):
    samples = design()
    shuffled = samples.sample(frac=1, random_state=1).reset_index(drop=True)
    one, other = (
        assign_splits(samples, declare(), shares())[0],
        assign_splits(shuffled, declare(), shares())[0],
    )
    for role in ("test", "validation"):
        assert seen(samples, one, kind, [f"{role}_{kind}"]) == seen(
            shuffled, other, kind, [f"{role}_{kind}"]
        )


def test_the_split_of_a_sample_does_not_depend_on_the_order_of_the_rows(declare):
    samples = design()
    shuffled = samples.sample(frac=1, random_state=1).reset_index(drop=True)
    one = assign_splits(samples, declare(), shares())[0].set_axis(samples["sample_id"])
    other = assign_splits(shuffled, declare(), shares())[0].set_axis(shuffled["sample_id"])
    assert one.sort_index().equals(other.sort_index())


def test_the_index_of_the_table_does_not_matter(declare):
    samples = design()
    plain = assign_splits(samples, declare(), shares())[0]
    named = assign_splits(
        samples.set_axis([f"row{number}" for number in range(len(samples))]), declare(), shares()
    )[0]
    assert plain.tolist() == named.tolist()


def test_assigning_splits_leaves_the_table_alone(declare):
    samples = design()
    before = samples.copy()
    assign_splits(samples, declare(), shares())
    pd.testing.assert_frame_equal(samples, before)


# shares


def test_the_shares_are_those_of_the_parameters(declare):
    samples = design(studies=20, perturbations=20)
    split, _ = assign_splits(
        samples,
        declare(),
        shares(
            study=0.1,
            perturbation=0.1,
            combination=0.05,
            test_random=0.2,
            validation=0.1,
            test_control=0.5,
        ),
    )
    assert (
        len(seen(samples, split, "study", ["test_study"]))
        == len(seen(samples, split, "study", ["validation_study"]))
        == 2
    )
    assert len(seen(samples, split, "perturbation", ["test_perturbation"])) == 2
    assert (
        len(seen(samples, split, "combination", ["test_combination"]))
        == len(seen(samples, split, "combination", ["validation_combination"]))
        == round(0.05 * 16 * 3)
    )
    left = split.isin([TRAIN, "test_random", "validation"]).sum()
    assert (split == "test_random").sum() == round(0.2 * left) and (
        split == "validation"
    ).sum() == round(0.1 * left)
    controls = samples["perturbation"] == "control"
    free = controls & ~split.isin(["test_study", "validation_study"])
    for _, rows in samples[free].groupby("tissue"):
        assert (split[rows.index] == TEST_CONTROL).sum() == round(0.5 * len(rows))


def test_reserved_controls_are_controls_and_no_control_stands_in_a_pair_or_perturbation_split(
    declare,
):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares())
    assert set(samples["perturbation"][split == TEST_CONTROL]) == {"control"}
    treated_splits = [
        "test_combination",
        "validation_combination",
        "test_perturbation",
        "validation_perturbation",
    ]
    assert "control" not in set(samples["perturbation"][split.isin(treated_splits)])


# absent splits


def reasons(samples, data, **changes) -> dict[str, str]:
    """Why which splits are absent; every split is there or has a reason."""
    split, notes = assign_splits(samples, data, shares(**changes))
    audit_entities(samples, split, data)
    told = {note.split(" is absent: ")[0]: note.split(" is absent: ")[1] for note in notes}
    assert set(told) | set(split) == set(ALL) and not set(told) & set(split)
    return told


def test_a_single_context_has_no_pairs_to_hold_out(declare):
    told = reasons(design(tissues=1), declare())
    assert set(told) == {"test_combination", "validation_combination"}
    assert (
        "of 8 pairs of context and perturbation" in told["test_combination"]
        and "seen apart" in told["test_combination"]
    )


def test_a_single_perturbation_has_neither_pairs_nor_perturbations_to_hold_out(declare):
    told = reasons(design(perturbations=1), declare())
    assert set(told) == {
        f"{role}_{kind}"
        for role in ("test", "validation")
        for kind in ("combination", "perturbation")
    }
    assert "1 perturbations besides the control" in told["test_perturbation"]


def test_without_a_declared_control_nothing_of_perturbations_is_held_out(declare):
    told = reasons(design(control=False), declare(control=None))
    assert set(told) == {TEST_CONTROL} | {
        f"{role}_{kind}"
        for role in ("test", "validation")
        for kind in ("combination", "perturbation")
    }
    assert all("control" in told[name] for name in (TEST_CONTROL, "test_perturbation"))


def test_without_a_study_column_no_study_is_held_out(declare):
    told = reasons(design(), declare(study_column=None))
    assert set(told) == {"test_study", "validation_study"}


def test_without_a_study_column_the_reason_names_the_setting(declare):
    assert "data.study_column" in reasons(design(), declare(study_column=None))["test_study"]


def test_without_a_control_the_reason_names_the_setting(declare):
    assert "data.control" in reasons(design(), declare(control=None))["test_combination"]


def test_a_share_of_zero_is_the_reason_that_is_told(declare):
    told = reasons(
        design(),
        declare(),
        combination=0.0,
        perturbation=0.0,
        study=0.0,
        test_random=0.0,
        validation=0.0,
        test_control=0.0,
    )
    assert set(told) == set(ALL) - {TRAIN}
    for name in told:
        assert "share of 0.0" in told[name], (name, told[name])


def test_eight_samples_with_one_study_still_train(declare):
    samples = pd.DataFrame(
        {
            "sample_id": [f"s{n}" for n in range(8)],
            "study": "one",
            "tissue": "lung",
            "perturbation": ["control", "dex"] * 4,
            "study_date": "2014-01-01",
        }
    )
    told = reasons(samples, declare())
    split, _ = assign_splits(samples, declare(), shares())
    assert (split == TRAIN).sum() >= 5 and set(told) >= {
        "test_study",
        "test_combination",
        "test_perturbation",
    }


def test_one_sample_a_perturbation_is_no_obstacle(declare):
    samples = design(studies=1, tissues=1, perturbations=30, repeats=1)
    told = reasons(samples, declare())
    assert "test_perturbation" not in told and {
        "test_study",
        "test_combination",
        TEST_CONTROL,
    } <= set(told)


def test_studies_and_perturbations_that_are_missing_are_never_held_out(declare):
    samples = design()
    samples.loc[samples.index % 3 == 0, "study"] = None
    samples.loc[samples.index % 5 == 0, "perturbation"] = None
    split, _ = assign_splits(samples, declare(), shares())
    audit_entities(samples, split, declare())
    assert samples["study"][split.isin(["test_study", "validation_study"])].notna().all()
    assert (
        samples["perturbation"][split.isin(["test_perturbation", "test_combination"])].notna().all()
    )


@pytest.mark.parametrize("dtype", ["category", "string", "object"])
def test_context_columns_of_every_type_may_have_missing_values(declare, dtype):
    samples = design()
    samples.loc[samples.index % 4 == 0, "tissue"] = None
    reference = contexts(samples, declare())
    assert set(reference) == {"tissue0", "tissue1", "tissue2", "?"}
    assert contexts(samples.astype({"tissue": dtype}), declare()).tolist() == reference.tolist()


@pytest.mark.parametrize(
    "column",
    [
        pd.array([1, None] * 3, dtype="Int64"),
        pd.array([True, None] * 3, dtype="boolean"),
        [1.0, None] * 3,
        [pd.Timestamp("2020-01-01"), None] * 3,
    ],
)
def test_context_columns_of_numbers_may_have_missing_values(declare, column):
    assert contexts(pd.DataFrame({"tissue": column}), declare()).nunique() == 2


def test_without_context_columns_there_is_one_context(declare):
    assert set(contexts(design(), declare(context_columns=[]))) == {"all"}


@pytest.mark.parametrize("column", ["study", "perturbation", "tissue"])
def test_categorical_columns_with_unused_levels_split_like_text(declare, column):
    samples = design()
    categorical = samples.copy()
    categorical[column] = pd.Categorical(
        samples[column], categories=[*sorted(samples[column].unique(), reverse=True), "unused"]
    )
    assert (
        assign_splits(categorical, declare(), shares())[0].tolist()
        == assign_splits(samples, declare(), shares())[0].tolist()
    )


# the audit


def test_the_audit_accepts_what_is_assigned(declare):
    samples = design()
    split = assign_splits(samples, declare(), shares())[0]
    assert {"test_study", "test_perturbation", "test_combination"} <= set(split), (
        "there is something to audit"
    )
    audit_entities(samples, split, declare())


@pytest.mark.parametrize("kind", ["study", "perturbation", "combination"])
@pytest.mark.parametrize(
    ("held", "leak"),
    [("test", TRAIN), ("test", "validation"), ("test", "validation_study"), ("validation", TRAIN)],
)
def test_the_audit_names_an_entity_that_is_also_seen(declare, kind, held, leak):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares())
    rows = np.flatnonzero((split == f"{held}_{kind}").to_numpy())
    split.iloc[rows[0]] = leak
    name = entities(samples, kind).iloc[rows[0]].split(" + ")[-1]
    with pytest.raises(IntegrityError, match=rf"{held}_{kind} leaks: .*{name}"):
        audit_entities(samples, split, declare())


@pytest.mark.parametrize(
    ("kind", "part"), [("test_combination", "perturbation"), ("validation_combination", "tissue")]
)
def test_the_audit_names_the_part_of_a_held_out_pair_that_training_never_sees(declare, kind, part):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares())
    name = samples[part][split == kind].iloc[0]
    split[(samples[part] == name) & (split == TRAIN)] = "test_random"
    with pytest.raises(
        IntegrityError,
        match=rf"{kind} holds out pairs of the (perturbation|context) {name}, which training never sees",
    ):
        audit_entities(samples, split, declare())


def test_the_audit_reports_all_leaks_at_once(declare):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares())
    for kind in ("study", "perturbation", "combination"):
        split.iloc[np.flatnonzero((split == f"test_{kind}").to_numpy())[0]] = TRAIN
    with pytest.raises(IntegrityError) as caught:
        audit_entities(samples, split, declare())
    assert {problem.split(" leaks")[0] for problem in caught.value.problems} >= {
        "test_study",
        "test_perturbation",
        "test_combination",
    }


def test_the_audit_wants_a_sample_for_training(declare):
    samples = design(studies=1, tissues=1, perturbations=1, repeats=1)
    with pytest.raises(IntegrityError, match="no sample is left for training"):
        audit_entities(samples, pd.Series("test_random", index=samples.index), declare())


def test_the_audit_of_a_cohort_without_control_and_study_has_nothing_to_find(declare):
    samples = design()
    data = declare(control=None, study_column=None)
    split = assign_splits(samples, data, shares())[0]
    assert set(split) <= {"train", "validation", "test_random"}
    audit_entities(samples, split, data)


@pytest.mark.parametrize(
    "kind",
    [{"kind": "multilabel"}, {"kind": "embedding", "table": "drugs.parquet"}],
    ids=["multilabel", "embedding"],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_held_out_perturbation_is_not_shown_as_one_of_several(declare, kind, seed):
    """Who has seen "a|b" has seen "a"."""
    samples = design()
    samples["perturbation"] = samples["perturbation"].replace(
        {"drug0": "drug1|drug2", "drug3": "drug4|drug1"}
    )
    data = declare(
        covariates={"technical": {}, "biological": {}, "perturbation": {"perturbation": kind}}
    )
    split, _ = assign_splits(samples, data, shares(seed=seed))
    audit_entities(samples, split, data)
    labels = samples["perturbation"].str.split("|")
    for name, seen_by in (
        ("test_perturbation", split.isin(VISIBLE)),
        ("validation_perturbation", split == TRAIN),
    ):
        held = samples["perturbation"][split == name]
        assert len(held)
        for value in held.unique():
            whole = set(value.split("|"))
            assert not any(whole <= set(shown) for shown in labels[seen_by])


def test_the_audit_names_several_perturbations_that_show_a_held_out_one(declare):
    samples = pd.DataFrame(
        {"study": "s", "tissue": "t", "perturbation": ["a", "a|b", "b", "control"]}
    )
    split = pd.Series(["test_perturbation", TRAIN, TRAIN, TRAIN])
    covariates = {
        "technical": {},
        "biological": {},
        "perturbation": {"perturbation": {"kind": "multilabel"}},
    }
    with pytest.raises(IntegrityError, match=r"test_perturbation leaks: a\|b also in training"):
        audit_entities(samples, split, declare(covariates=covariates))
    # Where "a|b" is the name of one perturbation, it shows no other.
    covariates["perturbation"]["perturbation"] = {"kind": "categorical"}
    audit_entities(samples, split, declare(covariates=covariates))


# replicates of one sample


def replicates(*splits: str) -> tuple[np.ndarray, pd.Series, np.ndarray]:
    """One sample per split, all with the same telling counts, after one of training with counts of its own."""
    counts = np.vstack([np.arange(30)[::-1], *[np.arange(30)] * len(splits)])
    return (
        np.array([f"s{number}" for number in range(len(counts))]),
        pd.Series([TRAIN, *splits]),
        fingerprints(counts),
    )


@pytest.mark.parametrize(
    "splits",
    [
        (TRAIN, "test_random"),
        (TRAIN, "validation"),
        ("validation_study", "test_study"),
        (TEST_CONTROL, TRAIN),
    ],
)
def test_the_same_counts_on_both_sides_of_a_boundary_are_refused_by_name(splits):
    with pytest.raises(
        IntegrityError, match=rf"s1 \({splits[0]}\) and s2 \({splits[1]}\); keep one of each"
    ):
        audit_replicates(*replicates(*splits))


@pytest.mark.parametrize(
    "splits", [(TRAIN, TRAIN), ("test_random", TEST_CONTROL), ("validation", "validation_study")]
)
def test_the_same_counts_on_one_side_are_nobodys_leak(splits):
    assert audit_replicates(*replicates(*splits)) is None


def test_every_pair_across_a_boundary_is_counted_once(rng):
    counts = np.repeat(rng.integers(1, 100, (7, 40)), 3, axis=0)
    split = pd.Series([TRAIN, "test_random", "test_random"] * 7)
    with pytest.raises(IntegrityError, match=r"s0 \(train\) and s1 \(test_random\).*7 in all"):
        audit_replicates(
            np.array([f"s{number}" for number in range(21)]), split, fingerprints(counts)
        )


def test_rows_that_chance_may_repeat_tell_nothing():
    """Two shallow cells may well count the same few genes once each."""
    counts = np.zeros((4, 100), dtype=int)
    counts[:2, : TELLING_GENES - 1] = 1
    counts[2:, :TELLING_GENES] = 1
    found = fingerprints(counts)
    assert found[0] == found[1] == b"" and found[2] == found[3] != b""
    with pytest.raises(IntegrityError, match=r"s2 \(train\) and s3"):
        audit_replicates(
            np.array(["s0", "s1", "s2", "s3"]), pd.Series([TRAIN, "test_random"] * 2), found
        )


def test_a_fingerprint_does_not_depend_on_how_counts_are_stored(rng):
    counts = rng.integers(0, 200, (5, 50))
    assert all(
        (fingerprints(counts.astype(kind)) == fingerprints(counts)).all()
        for kind in (np.uint8, np.int32, np.float32)
    )
    assert (fingerprints(np.asfortranarray(counts)) == fingerprints(counts)).all()
    assert len(set(fingerprints(counts))) == 5
    assert (fingerprints(counts[:, ::-1]) != fingerprints(counts)).all()


# sizes


def test_sizes_count_what_each_split_holds(declare):
    samples = pd.DataFrame(
        {
            "study": ["s", "s", "t", "u", "u", None],
            "tissue": ["a", "b", "a", "a", "a", "b"],
            "perturbation": ["x", "x", "control", "x", "y", None],
        }
    )
    split = pd.Series([TRAIN, TRAIN, TRAIN, "test_study", "test_study", "validation"])
    expected = pd.DataFrame(
        [
            (TRAIN, 3, 2, 2, 1, 2, 1),
            ("validation", 1, 0, 1, 0, 0, 0),
            ("test_study", 2, 1, 1, 2, 2, 0),
        ],
        columns=["split", "samples", "studies", "contexts", "perturbations", "pairs", "controls"],
    )
    pd.testing.assert_frame_equal(sizes(samples, split, declare()), expected)


def test_sizes_of_what_is_assigned_add_up(declare):
    samples = design()
    split, _ = assign_splits(samples, declare(), shares())
    table = sizes(samples, split, declare()).set_index("split")
    assert (
        table["samples"].sum() == len(samples)
        and table["controls"].sum() == (samples["perturbation"] == "control").sum()
    )
    assert list(table.index) == [name for name in ALL if name in set(split)]
    assert table.loc["test_perturbation", "perturbations"] == len(
        seen(samples, split, "perturbation", ["test_perturbation"])
    )
