"""Orders of runs by simulated and real cohorts, on tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.cohorts.agreement import (
    Agreement,
    agreement_table,
    markdown,
    read_runs,
    scores_by_run,
)
from pipeline.gem.common.errors import InputError

# Cohort to the mse of the runs a, b, c, d.
MSE = {
    "synthetic": (1.0, 2.0, 3.0, 4.0),
    "alike": (0.1, 0.2, 0.3, 0.4),
    "opposite": (4.0, 3.0, 2.0, 1.0),
    "one_swap": (0.2, 0.1, 0.3, 0.4),
}


def run(number: int, cohorts=tuple(MSE)) -> pd.DataFrame:
    """scores.csv of a run: GEM, another predictor, and a scale that does not count."""
    rows = []
    for cohort in cohorts:
        mse = MSE[cohort][number]
        own = {"cohort": cohort, "scale": "means", "counts": True}
        rows.append(own | {"predictor": "gem", "mse": mse, "pearson": 1 - mse})
        rows.append(own | {"predictor": "ridge", "mse": 0.0, "pearson": 1.0})
        rows.append(own | {"scale": "sums", "counts": False, "predictor": "gem", "mse": 9.0})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def runs() -> dict[str, pd.DataFrame]:
    return {name: run(number) for number, name in enumerate("abcd")}


def test_scores_are_those_of_gem_on_the_scale_that_counts(runs):
    table = scores_by_run(runs, "mse")
    assert list(table.index) == list("abcd")
    assert table.to_dict("list") == {name: list(values) for name, values in MSE.items()}


def test_a_cohort_that_a_run_lacks_is_left_out(runs):
    table = scores_by_run(runs | {"d": run(3, ("synthetic", "alike"))}, "mse")
    assert list(table) == ["synthetic", "alike"]


def test_agreement_is_counted_over_real_cohorts(runs):
    table = agreement_table(scores_by_run(runs, "mse"), {"synthetic"}, "mse").set_index("cohort")
    own = table.loc["synthetic"]
    # Of six pairs all, none and five agree; tau = (concordant - discordant) / 6.
    assert own["kendall"] == pytest.approx((1 - 1 + 4 / 6) / 3)
    assert (own["kendall_low"], own["kendall_high"]) == (-1, 1)
    assert own["pairs"] == 18 and own["same"] == pytest.approx((6 + 0 + 5) / 18)
    assert own["best"] == pytest.approx(1 / 3)  # alike
    assert own["worst"] == pytest.approx(2 / 3)  # alike, one_swap
    assert own["cohorts"] == 3
    real = table.loc["between real cohorts"]
    # alike and opposite, alike and one_swap, opposite and one_swap.
    assert real["kendall"] == pytest.approx((-1 + 4 / 6 - 4 / 6) / 3)
    assert real["pairs"] == 18 and real["same"] == pytest.approx((0 + 5 + 1) / 18)


def test_more_correlation_and_less_error_are_better(runs):
    errors, correlations = (
        agreement_table(scores_by_run(runs, score), {"synthetic"}, score)
        for score in ("mse", "pearson")
    )
    pd.testing.assert_frame_equal(errors, correlations)
    first, second = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    error, correlation = (Agreement.of(first, second, score) for score in ("mse", "pearson"))
    assert error.kendall == correlation.kendall == pytest.approx(1 / 3)
    assert (error.pairs, error.same) == (correlation.pairs, correlation.same) == (3, 2)
    assert error.best and not error.worst
    assert correlation.worst and not correlation.best


def test_a_difference_below_two_percent_is_no_order():
    first, second = np.array([1.0, 1.01, 2.0]), np.array([1.0, 0.5, 3.0])
    found = Agreement.of(first, second, "mse")
    assert (found.pairs, found.same) == (2, 2)
    near = np.array([0.50, 0.51, 0.90])
    assert Agreement.of(near, -second, "pearson").pairs == 2


def test_equal_scores_have_no_rank_correlation_and_no_clear_pairs():
    found = Agreement.of(np.ones(3), np.array([1.0, 2.0, 3.0]), "mse")
    assert found.kendall is None and found.pairs == 0
    scores = pd.DataFrame({"synthetic": [1.0] * 3, "alike": [1.0, 2.0, 3.0]}, index=list("abc"))
    table = agreement_table(scores, {"synthetic"}, "mse")
    assert table.loc[0, ["kendall", "same"]].isna().all()
    assert "| synthetic | – (– to –) | – of 0 |" in markdown(scores, table, "mse")


def test_the_text_has_the_scores_and_the_agreement(runs):
    scores = scores_by_run(runs, "mse")
    text = markdown(scores, agreement_table(scores, {"synthetic"}, "mse"), "mse")
    assert "| one_swap | 0.200 | 0.100 | 0.300 | 0.400 |" in text
    assert "| synthetic | 0.22 (-1.00 to 1.00) | 0.61 of 18 | 0.33 | 0.67 | 3 |" in text


def test_runs_without_a_common_real_and_simulated_cohort_are_refused(runs):
    scores = scores_by_run(runs, "mse")
    for simulated in (set(), set(scores)):
        with pytest.raises(InputError, match="expected a simulated and a real cohort"):
            agreement_table(scores, simulated, "mse")
    apart = {"a": run(0, ("alike",)), "b": run(1, ("opposite",)), "c": run(2, ("one_swap",))}
    with pytest.raises(InputError, match="no cohort has a mse in all of these runs"):
        scores_by_run(apart, "mse")


def test_absent_and_too_few_runs_are_named(tmp_path):
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        run(number).to_csv(tmp_path / name / "scores.csv", index=False)
    with pytest.raises(InputError) as caught:
        read_runs(["first", "secnd"], tmp_path)
    absent, few = caught.value.problems
    assert "did you mean second?" in absent and "--name secnd" in absent
    assert few == "2 runs: expected 3 or more"
    with pytest.raises(InputError, match="2 runs: expected 3 or more"):
        read_runs(["first", "second", "second"], tmp_path)
