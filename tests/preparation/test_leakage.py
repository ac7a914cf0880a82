"""Leakage checks: entities, parts of held-out pairs, samples with equal counts."""

import numpy as np
import pandas as pd
import pytest
from support.designs import NO_COVARIATES, all_splits, design, entity_names

from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.data.splits import TEST_CONTROL, TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_duplicate_samples, check_split_leakage
from pipeline.gem.preparation.qc import MIN_FINGERPRINT_GENES, fingerprint_counts


@pytest.fixture
def assigned(declare) -> tuple[pd.DataFrame, pd.Series]:
    """(samples, splits that pass the check)"""
    samples = design()
    split, _ = assign_splits(samples, declare(), all_splits())
    check_split_leakage(samples, split, declare())
    return samples, split


@pytest.mark.parametrize("kind", ["study", "perturbation", "combination"])
@pytest.mark.parametrize(
    ("held_out", "leak"),
    [("test", TRAIN), ("test", "validation"), ("test", "validation_study"), ("validation", TRAIN)],
)
def test_a_held_out_entity_in_a_visible_split_is_refused(declare, assigned, kind, held_out, leak):
    samples, split = assigned
    row = np.flatnonzero(split == f"{held_out}_{kind}")[0]
    split.iloc[row] = leak
    name = entity_names(samples, kind).iloc[row].split(" + ")[-1]
    with pytest.raises(IntegrityError, match=rf"{held_out}_{kind} leaks: .*{name}"):
        check_split_leakage(samples, split, declare())


@pytest.mark.parametrize(
    ("name", "part", "column"),
    [
        ("test_combination", "perturbation", "perturbation"),
        ("validation_combination", "context", "tissue"),
    ],
)
def test_a_part_of_a_held_out_pair_that_training_lacks_is_refused(
    declare, assigned, name, part, column
):
    samples, split = assigned
    value = samples[column][split == name].iloc[0]
    split[(samples[column] == value) & (split == TRAIN)] = "test_random"
    message = rf"{name} holds out pairs of the {part} {value}, which is absent from training"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, split, declare())


def test_all_leaks_are_reported_at_once(declare, assigned):
    samples, split = assigned
    names = {"test_study", "test_perturbation", "test_combination"}
    for name in names:
        split.iloc[np.flatnonzero(split == name)[0]] = TRAIN
    with pytest.raises(IntegrityError) as caught:
        check_split_leakage(samples, split, declare())
    assert {problem.split(" leaks")[0] for problem in caught.value.problems} >= names


def test_an_empty_training_split_is_refused(declare):
    samples = design(studies=1, tissues=1, perturbations=1, repeats=1)
    split = pd.Series("test_random", index=samples.index)
    with pytest.raises(IntegrityError, match="no sample is left for training"):
        check_split_leakage(samples, split, declare())


def test_a_combination_leaks_a_perturbation_only_if_the_column_is_multilabel(declare):
    samples = pd.DataFrame(
        {"study": "s", "tissue": "t", "perturbation": ["a", "a|b", "b", "control"]}
    )
    split = pd.Series(["test_perturbation", TRAIN, TRAIN, TRAIN])

    def declare_kind(kind: str):
        return declare(
            covariates=NO_COVARIATES | {"perturbation": {"perturbation": {"kind": kind}}}
        )

    with pytest.raises(IntegrityError, match=r"test_perturbation leaks: a\|b also in training"):
        check_split_leakage(samples, split, declare_kind("multilabel"))
    check_split_leakage(samples, split, declare_kind("categorical"))


# samples with equal counts


@pytest.mark.parametrize(
    ("first", "second", "is_leak"),
    [
        (TRAIN, "test_random", True),
        (TRAIN, "validation", True),
        ("validation_study", "test_study", True),
        (TEST_CONTROL, TRAIN, True),
        (TRAIN, TRAIN, False),
        ("test_random", TEST_CONTROL, False),
        ("validation", "validation_study", False),
    ],
)
def test_equal_counts_leak_between_splits_of_different_roles(first, second, is_leak):
    counts = np.vstack([np.arange(30)[::-1], np.arange(30), np.arange(30)])
    names, split = np.array(["s0", "s1", "s2"]), pd.Series([TRAIN, first, second])
    if is_leak:
        message = rf"s1 \({first}\) and s2 \({second}\); keep one of each"
        with pytest.raises(IntegrityError, match=message):
            check_duplicate_samples(names, split, fingerprint_counts(counts))
    else:
        check_duplicate_samples(names, split, fingerprint_counts(counts))


def test_each_set_of_equal_samples_is_reported_once(rng):
    counts = np.repeat(rng.integers(1, 100, (7, 40)), 3, axis=0)
    names, split = np.arange(21).astype(str), pd.Series([TRAIN, "test_random", "test_random"] * 7)
    with pytest.raises(IntegrityError, match=r"0 \(train\) and 1 \(test_random\).*7 in all"):
        check_duplicate_samples(names, split, fingerprint_counts(counts))


def test_samples_with_few_detected_genes_have_no_fingerprint():
    """Two shallow cells may have the same few counts by chance."""
    counts = np.zeros((4, 100), dtype=int)
    counts[:2, : MIN_FINGERPRINT_GENES - 1] = 1
    counts[2:, :MIN_FINGERPRINT_GENES] = 1
    fingerprints = fingerprint_counts(counts)
    assert fingerprints[0] == fingerprints[1] == b""
    assert fingerprints[2] == fingerprints[3] != b""
    split = pd.Series([TRAIN, "test_random"] * 2)
    with pytest.raises(IntegrityError, match=r"s2 \(train\) and s3"):
        check_duplicate_samples(np.array(["s0", "s1", "s2", "s3"]), split, fingerprints)


def test_fingerprints_depend_on_the_counts_and_not_on_their_storage(rng):
    counts = rng.integers(0, 200, (5, 50))
    fingerprints = fingerprint_counts(counts)
    for stored in (
        *map(counts.astype, (np.uint8, np.int32, np.float32)),
        np.asfortranarray(counts),
    ):
        assert (fingerprint_counts(stored) == fingerprints).all()
    assert len(set(fingerprints)) == 5
    assert (fingerprint_counts(counts[:, ::-1]) != fingerprints).all()
