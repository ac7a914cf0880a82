"""Speed and memory of predictions. `make benchmark` measures them at full size."""

from pathlib import Path

import pytest

from benchmarks.prediction import compare, peak_memory, random_model_and_query


@pytest.mark.integration
def test_prediction_is_not_slower_than_a_simple_loop_and_has_its_numbers(tmp_path):
    gem, query = random_model_and_query(8000, 1000, 256)
    ratios: list[float] = []
    # 1.4 to 1.6 on a busy machine. Other work lowers a ratio: the best of some turns counts.
    while len(ratios) < 8 and max(ratios, default=0) < 1.2:
        seconds, shares = compare(gem, query, 2, tmp_path)
        simple, predictor = seconds["by processor time"].values()
        ratios += [slow / fast for slow, fast in zip(simple, predictor, strict=True)]
        assert sum(shares.values()) == pytest.approx(1)
    assert max(ratios) > 1.2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux has the peak of memory")
@pytest.mark.integration
def test_memory_does_not_grow_with_the_rows_of_a_query(tmp_path):
    """In small blocks; the counts of the additional rows alone are 76 MiB."""
    gem, query = random_model_and_query(26_000, 1000, 16)
    gem.save(tmp_path / "model.safetensors")
    setup = "from pipeline.gem.prediction import predictor as p\np.QUERY_ROWS = 2**11\n"
    setup += "p.BLOCK_VALUES = 2**19"
    few, many = (peak_memory(query.head(rows), tmp_path, setup) for rows in (6_000, 26_000))
    assert many < few + 38 * 2**20
