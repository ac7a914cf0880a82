"""What a fold holds out, and that the rest stays in training."""

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from benchmarks.cohorts.declarations import Declaration, read_task
from benchmarks.cohorts.folds import draw_folds, inner_folds
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cleaning import clean_samples
from pipeline.gem.data.labels import LabelForm, label_texts
from pipeline.gem.preparation.assign_splits import assign_splits

DEFAULTS = read_params(ROOT / "params.yaml")


@pytest.fixture
def params(cohorts):
    return read_task("tiny", cohorts, DEFAULTS).params


@pytest.fixture
def whole_params(params):
    """With the batch as the study and the time as the level."""
    columns = {"study_column": "batch", "level_column": "perturbation_time"}
    return params.override({f"data.{key}": value for key, value in columns.items()})


def folds_of(samples: pd.DataFrame, params, **changes) -> list:
    column = {"column": params.data.level_column} if changes.get("hold_out") == "levels" else {}
    declaration = Declaration.model_validate({"data": {}, "hold_out": "pairs"} | column | changes)
    return draw_folds(samples, declaration, params)


def test_each_pair_is_a_fold_and_two_draws_are_equal(samples, params):
    folds = folds_of(samples, params)
    assert {fold.name for fold in folds} == {
        f"donor {donor} / drug {drug}" for donor in range(3) for drug in "AB"
    }
    assert folds == folds_of(samples.iloc[::-1], params)
    assert folds_of(samples, params, at_most=2) == folds[:2]


def test_each_condition_is_a_fold_that_names_its_time(samples, params):
    folds = folds_of(samples, params, hold_out="conditions", at_most=20)
    assert len(folds) == 12
    mapping = {"donor": "donor 1", "perturbation": "drug A", "perturbation_time": "3 hours"}
    assert (mapping,) in [fold.mappings for fold in folds]


def test_a_set_of_perturbations_known_apart_is_a_fold(samples, params):
    """Also where no other donor has it; a set with a label that nothing else has is none."""
    only = (samples["donor"] == "donor 1") & (samples["perturbation"] == "drug B")
    kinds = {"covariates.perturbation.perturbation": {"kind": "multilabel"}}
    multilabel = params.override({f"data.{key}": value for key, value in kinds.items()})
    for text, is_fold in (("drug A|drug B", True), ("drug B|drug C", False)):
        changed = samples.assign(perturbation=samples["perturbation"].mask(only, text))
        name = f"donor 1 / {text}"
        assert (name in {fold.name for fold in folds_of(changed, multilabel)}) == is_fold
        assert name not in {fold.name for fold in folds_of(changed, params)}


def test_a_perturbation_of_one_context_is_not_held_out(samples, params):
    only = samples[(samples["perturbation"] != "drug B") | (samples["donor"] == "donor 1")]
    assert {fold.name for fold in folds_of(only, params)} == {
        f"donor {donor} / drug A" for donor in range(3)
    }
    alone = samples[samples["donor"] == "donor 0"]
    with pytest.raises(InputError, match="none can be held out"):
        folds_of(alone, params)


def test_a_context_is_held_out_with_all_its_perturbations_if_it_has_controls(samples, params):
    folds = folds_of(samples, params, hold_out="contexts")
    assert sorted(fold.name for fold in folds) == ["donor 0", "donor 1", "donor 2"]
    assert {fold.split for fold in folds} == {"test_context"}
    assert ({"donor": "donor 0"},) in [fold.mappings for fold in folds]
    control = samples["perturbation"] == "control"
    without = samples[(samples["donor"] != "donor 0") | ~control]
    assert len(folds_of(without, params, hold_out="contexts")) == 2
    own = samples.assign(
        perturbation=samples["perturbation"].where(samples["donor"] != "donor 1", "drug C")
    )
    own.loc[control, "perturbation"] = "control"
    names = [fold.name for fold in folds_of(own, params, hold_out="contexts")]
    assert "donor 1" not in names and names


@pytest.mark.parametrize(
    ("hold_out", "names", "split"),
    [
        ("levels", {"24 hours", "3 hours"}, "test_level"),
        ("studies", {"batch 0", "batch 1"}, "test_study"),
    ],
)
def test_each_study_or_level_is_a_fold(samples, whole_params, hold_out, names, split):
    folds = folds_of(samples, whole_params, hold_out=hold_out)
    assert {fold.name for fold in folds} == names
    assert {fold.split for fold in folds} == {split}
    column = "batch" if hold_out == "studies" else "perturbation_time"
    assert all(fold.mappings == ({column: fold.name},) for fold in folds)
    at_once = folds_of(samples, whole_params, hold_out=hold_out, at_once=2)
    assert [len(fold.mappings) for fold in at_once] == [1, 1]


@pytest.mark.parametrize("hold_out", ["levels", "studies"])
def test_a_study_or_level_with_what_training_needs_stays(samples, whole_params, hold_out):
    """The only samples of a drug, or all controls."""
    first = samples["batch" if hold_out == "studies" else "perturbation_time"]
    name = "batch 0" if hold_out == "studies" else "3 hours"
    control = samples["perturbation"] == "control"
    for rows in (
        (first == name) | (samples["perturbation"] != "drug B"),
        (first == name) | ~control,
    ):
        folds = folds_of(samples[rows], whole_params, hold_out=hold_out)
        assert len(folds) == 1 and folds[0].name != name
    with pytest.raises(InputError, match="none can be held out"):
        folds_of(samples[first == name], whole_params, hold_out=hold_out)


@pytest.mark.parametrize(
    "hold_out", ["pairs", "conditions", "contexts", "levels", "studies", "samples"]
)
def test_prepare_holds_out_what_the_fold_names(samples, whole_params, hold_out):
    params = whole_params
    fold = folds_of(samples, params, hold_out=hold_out)[0]
    table = samples.rename_axis("sample_id").reset_index()
    table = clean_samples(LabelForm.of(params.data).table(table), params.data.covariates, "here")
    split, _ = assign_splits(table, params.data, fold.params(params).splits)
    held_out = table[split == fold.split]
    sizes = {"pairs": 4, "conditions": 2, "contexts": 8, "samples": round(0.2 * len(samples))}
    sizes |= {"levels": 18, "studies": 18}
    assert len(held_out) == sizes[hold_out]
    if hold_out == "contexts":
        assert set(held_out["donor"]) == {fold.name}
    others = {"test_control", "test_perturbation", "test_study", "test_level"}
    assert not set(split) & (others - {fold.split})


def test_a_fold_of_several_pairs_leaves_each_part_in_training(samples, params):
    (first, *_) = folds_of(samples, params, at_once=6)
    assert len(first.mappings) == 4  # of each drug one donor stays
    drugs = pd.Series([mapping["perturbation"] for mapping in first.mappings])
    assert drugs.value_counts().max() == 2
    assert first.name.endswith("and 3 more")


def test_a_fold_holds_out_nothing_else(samples, params):
    splits = folds_of(samples, params)[0].params(params).splits
    assert (splits.test_random, splits.test_control, splits.perturbation, splits.study) == (0,) * 4
    assert splits.validation == params.splits.validation
    assert splits.validation_combination == params.splits.validation_combination
    assert len(splits.combination) == 1


def test_samples_are_drawn_anew_in_each_fold(samples, params):
    folds = folds_of(samples, params, hold_out="samples", at_most=3, share=0.25)
    splits = [fold.params(params).splits for fold in folds]
    assert [each.test_random for each in splits] == [0.25] * 3
    assert len({each.seed for each in splits}) == 3
    assert all(each.combination == 0 for each in splits)


@pytest.mark.parametrize("hold_out", ["pairs", "conditions", "contexts"])
def test_an_inner_fold_lies_in_the_training_part_of_a_fold(samples, whole_params, hold_out):
    declaration = Declaration(data={}, hold_out=hold_out)
    outer = draw_folds(samples, declaration, whole_params)
    inner = inner_folds(samples, declaration, whole_params)
    table = samples.rename_axis("sample_id").reset_index()
    data = whole_params.data
    table = clean_samples(LabelForm.of(data).table(table), data.covariates, "here")
    assert inner == inner_folds(samples.iloc[::-1], declaration, whole_params)
    for fold in inner:
        assert fold.excluded in [each.mappings for each in outer]
        assert fold.mappings and not set(map(str, fold.mappings)) & set(map(str, fold.excluded))
        split, _ = assign_splits(table, data, fold.params(whole_params).splits)
        for mapping in (*fold.mappings, *fold.excluded):
            equal = [label_texts(table[name]) == value for name, value in mapping.items()]
            rows = np.logical_and.reduce(equal)
            rows &= (table["perturbation"] != "control").to_numpy() | (hold_out != "contexts")
            assert rows.any() and set(split[rows]) == {fold.split}


def test_inner_folds_of_samples_have_other_seeds(samples, params):
    declaration = Declaration(data={}, hold_out="samples", at_most=3)
    outer, inner = (
        draw_folds(samples, declaration, params),
        inner_folds(samples, declaration, params),
    )
    assert not {fold.seed for fold in outer} & {fold.seed for fold in inner}
    assert len(inner) == len(outer) and not any(fold.excluded for fold in inner)


def test_without_a_second_fold_there_is_no_inner_one(samples, params):
    two = samples[samples["donor"] != "donor 2"]
    two = two[two["perturbation"] != "drug B"]
    assert len(folds_of(two, params)) == 2
    with pytest.raises(InputError, match="no fold leaves another one"):
        inner_folds(two, Declaration(data={}, hold_out="pairs"), params)
