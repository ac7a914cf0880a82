"""Anyone can compute a score again from the files, with nothing but Parquet and numpy."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from support.comparison import SEEDS, World, world_of

from pipeline.gem.evaluation.prediction_files import write_predictions
from pipeline.gem.evaluation.predictors import Prediction


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


@pytest.mark.parametrize("split", ["test_random", "test_study"])
def test_mse_is_recomputed_from_the_file_and_the_counts_alone(world, split, tmp_path):
    write_predictions(*world.by_split[split], SEEDS, tmp_path)
    table = pd.read_parquet(tmp_path / f"{split}.parquet")
    counts = (
        pd.DataFrame(world.cohort.counts([split]), index=world.cohort.rows([split])["sample_id"])
        .loc[table["sample_id"]]
        .to_numpy(dtype=float)
    )
    totals = (
        world.cohort.samples.set_index("sample_id")
        .loc[table["sample_id"], "total"]
        .to_numpy(dtype=float)
    )
    observed = np.log1p(counts * 1e6 / totals[:, None])
    said = {name: np.nanmean((np.stack(table[name]) - observed) ** 2) for name in table.columns[2:]}
    scores = world.result(split).scores.query("metric == 'mse'").set_index("predictor")["value"]
    for name, value in scores.items():
        columns = [f"{name}:{seed}" for seed in SEEDS[name]] if name in SEEDS else [name]
        assert np.mean([said[column] for column in columns]) == pytest.approx(value, rel=1e-5), name


def test_seeds_have_columns_of_their_own_and_a_predictor_that_says_nothing_none(world, tmp_path):
    scene, said = world.by_split["test_random"]
    nothing = Prediction(None, reason="no reference")
    write_predictions(
        scene,
        {"gem": said["gem"], "gem_reference": [nothing] * 2, "ridge": said["ridge"]},
        SEEDS,
        tmp_path / "new" / "folder",
    )
    table = pq.read_table(tmp_path / "new" / "folder" / "test_random.parquet")
    assert table.column_names == ["sample_id", "condition", "gem:1", "gem:2", "ridge"]
    assert table["condition"].to_pylist() == list(scene.condition_name)
    np.testing.assert_array_equal(np.stack(table["gem:2"].to_numpy()), said["gem"][1].values)


def test_the_same_predictions_write_the_same_bytes(world, tmp_path):
    for folder in ("one", "two"):
        write_predictions(*world.by_split["test_study"], SEEDS, tmp_path / folder)
    assert (tmp_path / "one" / "test_study.parquet").read_bytes() == (
        tmp_path / "two" / "test_study.parquet"
    ).read_bytes()
