"""Test splits of new conditions, new contexts with known controls and new levels, to the page."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import SEEDS
from support.settings import at_source

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import TESTS
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.report import page
from pipeline.gem.evaluation.report.contents import report_data
from pipeline.gem.evaluation.run import evaluate_models
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.preparation.prepare import write_cohort

CONTEXT = ["tissue", "cell_type"]
CONDITION = [*CONTEXT, "perturbation", "perturbation_dose", "perturbation_time"]
SHARES = {"splits.condition": 0.3, "splits.context": 0.25, "splits.level": 0.3}
LEVEL = {"data.level_column": "perturbation_time"}


@pytest.fixture(scope="module")
def known_cohort(params, source_folder, tmp_path_factory) -> Cohort:
    """The tiny cohort with these splits too."""
    folder = tmp_path_factory.mktemp("known")
    changed = params.override(at_source(source_folder) | SHARES | LEVEL)
    write_cohort(open_source(changed.data), changed.data, changed.splits, folder / "cohort")
    return Cohort(folder / "cohort")


@pytest.fixture(scope="module")
def splits(known_cohort, params) -> EvaluationSplits:
    return EvaluationSplits(known_cohort, params.evaluate)


def keys(samples: pd.DataFrame, columns: list[str]) -> list[tuple]:
    return list(samples[columns].astype(str).itertuples(index=False, name=None))


def test_entities_of_new_conditions_are_conditions(splits):
    split, visible = splits.split("test_condition"), splits.visible.samples
    names = keys(split.samples, CONDITION)
    assert len(set(zip(names, split.entity, strict=True))) == len(set(names)) > 5
    assert split.entity_kind == "condition" and split.treated.all()
    assert not set(names) & set(keys(visible, CONDITION))
    pair = [*CONTEXT, "perturbation"]
    assert set(keys(split.samples, pair)) <= set(keys(visible, pair))


def test_references_and_controls_of_a_new_context_are_its_own(splits, known_cohort):
    split, visible = splits.split("test_context"), splits.visible.samples
    names = keys(split.samples, CONTEXT)
    assert split.entity_kind == "context" and len(set(split.entity)) == len(set(names)) == 1
    assert keys(split.reference_samples, CONTEXT) == names
    for side in (split.observed_control, split.predicted_control, split.reference_control):
        assert np.isfinite(side.mean).all()
    own = visible[[key == names[0] for key in keys(visible, CONTEXT)]]
    assert len(own) and set(own["perturbation"]) == {"control"}


def test_entities_of_new_levels_are_levels(splits):
    split, visible = splits.split("test_level"), splits.visible.samples
    names = keys(split.samples, ["perturbation_time"])
    assert split.entity_kind == "level"
    assert len(set(zip(names, split.entity, strict=True))) == len(set(names)) > 0
    assert not set(names) & set(keys(visible, ["perturbation_time"]))


def test_the_page_asks_the_question_of_each_split(known_cohort, params, model_directory, tmp_path):
    models = {"gem": TrainedGEM.load_seeds(model_directory)[0][:1]}
    seeds = {"gem": SEEDS["gem"][:1]}
    evaluation = evaluate_models(known_cohort, models, seeds, params.evaluate, tmp_path)
    scores = evaluation.tables["scores"]
    assert list(scores["split"].unique()) == [name for name in TESTS if known_cohort.has(name)]
    text = page.render(report_data(evaluation, known_cohort, params, tmp_path))
    for name, question in (
        ("test_condition", "Known perturbations at a new dose or time"),
        ("test_context", "New contexts (a donor, a cell type) of which only controls are in"),
        ("test_level", "New donors, doses or times (data.level_column) without a sample in"),
    ):
        section = text.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert question in section
        rows = scores[(scores["split"] == name) & (scores["predictor"] == "gem")]
        assert rows.set_index("metric")["value"][["mse", "delta_pearson"]].notna().all()
        assert (evaluation.tables["comparisons"].query("split == @name")["of"] != "").all()
