"""Predictions as files, so that anyone can compute a score again without this code.

predictions/<split>.parquet: `sample_id`, `condition`, then per predictor a list of log-CPM in the cohort's gene order;
of a model trained with several seeds one column each, `gem:1`, `gem:2`, named by the seed.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.gem.evaluation.predictors import Prediction
from pipeline.gem.evaluation.test_split import EvaluationSplit


def write_predictions(
    scene: EvaluationSplit,
    predictions: Mapping[str, list[Prediction]],
    seeds: Mapping[str, list[int]],
    folder: Path,
) -> None:
    """One file for the scene; predictors that say nothing have no column."""
    columns = {
        "sample_id": pa.array(scene.samples["sample_id"]),
        "condition": pa.array(scene.condition_name),
    }
    for name, said in predictions.items():
        labels = [f"{name}:{seed}" for seed in seeds[name]] if name in seeds else [name]
        for label, one in zip(labels, said, strict=True):
            if one.values is not None:
                flat = pa.array(np.ascontiguousarray(one.values, dtype=np.float32).reshape(-1))
                columns[label] = pa.FixedSizeListArray.from_arrays(flat, one.values.shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns),
        folder / f"{scene.name}.parquet",
        compression="zstd",
        compression_level=1,
        use_byte_stream_split=False,
    )
