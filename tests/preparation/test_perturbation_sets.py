"""Sets of perturbations ("a|b") that training has only apart: combinations too."""

import pandas as pd
import pytest
from support.designs import NO_COVARIATES, no_splits

from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.assign_splits import assign_splits
from pipeline.gem.preparation.leakage import check_split_leakage

SETS = ("a|b", "a|c", "b|c", "c|d")
HELD_OUT = "test_combination"


def screen(tissues: int = 1, names: tuple[str, ...] = ("a", "b", "c", "d", *SETS)) -> pd.DataFrame:
    """Three samples of each perturbation and of the control, in each tissue."""
    rows = [
        (f"tissue{tissue}", name)
        for tissue in range(tissues)
        for name in ("control", *names)
        for _ in range(3)
    ]
    samples = pd.DataFrame(rows, columns=["tissue", "perturbation"])
    samples.insert(0, "sample_id", [f"s{number:03d}" for number in range(len(samples))])
    return samples


@pytest.fixture
def sets(declare):
    """Declarations by the kind of the perturbation."""

    def declare_sets(kind: str = "multilabel"):
        covariate = {"kind": kind} | ({"table": "drugs.csv"} if kind == "embedding" else {})
        covariates = NO_COVARIATES | {"perturbation": {"perturbation": covariate}}
        return declare(covariates=covariates, study_column=None, date_column=None)

    return declare_sets


@pytest.fixture
def hold_out(sets):
    def assign(samples: pd.DataFrame, kind: str = "multilabel", **changes):
        split, notes = assign_splits(samples, sets(kind), no_splits(**changes))
        check_split_leakage(samples, split, sets(kind))
        return set(samples["perturbation"][split == HELD_OUT]), split, notes

    return assign


@pytest.mark.parametrize("kind", ["multilabel", "embedding"])
def test_a_listed_set_of_one_context_is_held_out_and_noted(hold_out, kind):
    listed = [{"perturbation": "a|b"}]
    held_out, split, notes = hold_out(screen(), kind, combination=listed)
    assert held_out == {"a|b"} and (split == HELD_OUT).sum() == 3
    assert set(split) == {HELD_OUT, TRAIN}
    text = "3 of 3 samples of test_combination have sets of perturbations that training has only"
    assert [note for note in notes if note.startswith(text) and note.endswith("apart: a|b")]


def test_a_listed_set_is_held_out_of_all_contexts(hold_out):
    held_out, split, _ = hold_out(screen(tissues=3), combination=[{"perturbation": "a|b"}])
    assert held_out == {"a|b"} and (split == HELD_OUT).sum() == 9


def test_a_set_that_training_has_in_another_context_is_not_noted(hold_out):
    listed = [{"tissue": "tissue1", "perturbation": "a|b"}]
    _, _, notes = hold_out(screen(tissues=2), combination=listed)
    assert not [note for note in notes if "only apart" in note]


@pytest.mark.parametrize("seed", range(8))
def test_a_share_draws_sets_whose_labels_stay_and_no_single_one(hold_out, seed):
    held_out, split, _ = hold_out(screen(), seed=seed, combination=0.4)
    assert held_out and held_out < set(SETS)
    training = set(screen()["perturbation"][split == TRAIN])
    labels = {label for name in training for label in name.split("|")}
    assert all(set(name.split("|")) <= labels for name in held_out)


@pytest.mark.parametrize("seed", range(8))
def test_a_label_of_one_set_alone_keeps_the_set_in_training(hold_out, seed):
    """d is known from c|d only."""
    names = ("a", "b", "c", *SETS)
    held_out, _, _ = hold_out(screen(names=names), seed=seed, combination=0.5)
    assert held_out and "c|d" not in held_out


def test_one_perturbation_is_not_known_from_a_set(sets, hold_out):
    """Of a single perturbation another context is needed, as before."""
    with pytest.raises(InputError, match="no other context of the perturbation a"):
        assign_splits(screen(), sets(), no_splits(combination=[{"perturbation": "a"}]))
    held_out, _, _ = hold_out(
        screen(tissues=2), combination=[{"tissue": "tissue0"} | {"perturbation": "a"}]
    )
    assert held_out == {"a"}


@pytest.mark.parametrize("kind", ["multilabel", "categorical"])
def test_a_set_with_an_unknown_label_is_refused(sets, kind):
    """A categorical text has no labels."""
    names = ("a", "c", "c|d", "a|b") if kind == "multilabel" else ("a", "b", "a|b")
    listed = [{"perturbation": "a|b"}]
    with pytest.raises(InputError, match=r"no other context of the perturbation a\|b"):
        assign_splits(screen(names=names), sets(kind), no_splits(combination=listed))


def test_validation_is_held_out_in_the_same_way(hold_out):
    lists = {
        "combination": [{"perturbation": "a|b"}],
        "validation_combination": [{"perturbation": "a|c"}],
    }
    _, split, _ = hold_out(screen(), **lists)
    assert set(screen()["perturbation"][split == "validation_combination"]) == {"a|c"}


def test_the_check_of_leakage_knows_sets(sets):
    samples = screen()
    split, _ = assign_splits(samples, sets(), no_splits(combination=[{"perturbation": "a|b"}]))
    leaked = split.copy()
    leaked[leaked[leaked == HELD_OUT].index[0]] = "validation"
    with pytest.raises(IntegrityError, match=r"test_combination leaks: tissue0 / a\|b also in"):
        check_split_leakage(samples, leaked, sets())
    alone = split.where(~samples["perturbation"].isin(["a", "a|c"]), "test_random")
    message = r"test_combination holds out pairs of the perturbation a\|b, which is absent"
    with pytest.raises(IntegrityError, match=message):
        check_split_leakage(samples, alone, sets())
    check_split_leakage(samples, split.where(samples["perturbation"] != "a", "test_random"), sets())
