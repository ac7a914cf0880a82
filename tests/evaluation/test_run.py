"""The files of an evaluation: scores can be recomputed from them, and they are reproducible."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.comparison import SEEDS, SPLITS

from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.evaluation.catalogue import TABLE_FILES
from pipeline.gem.evaluation.evaluation_split import PredictedSplit
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.run import (
    evaluate_models,
    load_models,
    write_predictions,
    write_tables,
)


def test_an_evaluation_writes_metrics_tables_and_predictions(
    cohort, params, model_directory, tmp_path
):
    models, seeds = load_models({"gem": model_directory}, cohort)
    assert seeds == {"gem": [1, 2]}
    evaluation = evaluate_models(cohort, models, seeds, params.evaluate, tmp_path)
    write_tables(evaluation, tmp_path)
    assert {path.stem for path in (tmp_path / "predictions").iterdir()} == set(SPLITS)
    tables = {name: pd.read_csv(tmp_path / file) for name, file in TABLE_FILES.items()}
    for name, table in tables.items():
        assert len(table) == len(evaluation.tables[name]) > 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics) == set(SPLITS) == {spread.split for spread in evaluation.spreads}
    for row in tables["scores"].itertuples():
        value = metrics[row.split][row.predictor][row.metric]
        assert value is None if pd.isna(row.value) else value == pytest.approx(row.value)
    assert set(tables["scores"]["metric"]) == set(METRICS)


def test_models_of_another_cohort_are_refused(cohort, model_directory, monkeypatch):
    monkeypatch.setattr(cohort, "genes", cohort.genes[::-1])
    with pytest.raises(IntegrityError):
        load_models({"gem": model_directory}, cohort)


@pytest.mark.parametrize("name", ["test_random", "test_study"])
def test_mse_is_recomputed_from_the_file_and_the_counts_alone(evaluation, name, tmp_path):
    write_predictions(*evaluation.by_split[name], SEEDS, tmp_path)
    table, cohort = pd.read_parquet(tmp_path / f"{name}.parquet"), evaluation.cohort
    counts = pd.DataFrame(cohort.counts([name]), index=cohort.rows([name])["sample_id"])
    counts = counts.loc[table["sample_id"]].to_numpy(dtype=float)
    totals = cohort.samples.set_index("sample_id").loc[table["sample_id"], "total"]
    observed = np.log1p(counts * 1e6 / totals.to_numpy(dtype=float)[:, None])
    mse = {
        column: np.nanmean((np.stack(table[column]) - observed) ** 2)
        for column in table.columns[2:]
    }
    scores = evaluation.result(name).scores.query("metric == 'mse'").set_index("predictor")["value"]
    for predictor, value in scores.items():
        columns = [f"{predictor}:{seed}" for seed in SEEDS.get(predictor, [])] or [predictor]
        assert np.mean([mse[column] for column in columns]) == pytest.approx(value, rel=1e-5)


def test_each_training_seed_has_a_column_and_an_absent_prediction_none(evaluation, tmp_path):
    split, predictions = evaluation.by_split["test_random"]
    absent = [PredictedSplit(None, reason="no reference")] * 2
    predictions = {name: predictions[name] for name in ("gem", "gem_reference", "ridge")}
    write_predictions(split, predictions | {"gem_reference": absent}, SEEDS, tmp_path / "a" / "b")
    table = pq.read_table(tmp_path / "a" / "b" / "test_random.parquet")
    assert table.column_names == ["sample_id", "condition", "gem:1", "gem:2", "ridge"]
    assert table["condition"].to_pylist() == list(split.condition_name)
    second = np.stack(table["gem:2"].to_numpy())
    np.testing.assert_array_equal(second, predictions["gem"][1].values)


def test_equal_predictions_write_equal_bytes(evaluation, tmp_path):
    for folder in ("a", "b"):
        write_predictions(*evaluation.by_split["test_study"], SEEDS, tmp_path / folder)
    first, second = (tmp_path / folder / "test_study.parquet" for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
