"""Portraits of cohorts: each number against a truth that is known, and the simulator against real cohorts."""

import json
from dataclasses import asdict, fields

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT, SHARED_DATA

from pipeline.gem.common.config import Data, read_params
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.report import realism as module
from pipeline.gem.evaluation.report.realism import (
    PUBLISHED,
    QUANTITIES,
    SAMPLES,
    CohortStatistics,
    Curve,
    Groups,
    Number,
    comparison_table,
    measured_rows,
    portrait,
    portrait_of,
    real_portraits,
)
from pipeline.gem.evaluation.report.realism_figure import credibility
from pipeline.gem.simulation.generator import draw_counts


def declared(context: list[str] | None = None, **changes) -> Data:
    """A cohort with studies and one perturbation column; `changes` as in params.yaml."""
    biology = {name: {"kind": "categorical"} for name in context or []}
    record = read_params(ROOT / "params.yaml").data.model_dump() | {
        "covariates": {
            "technical": {"study": {"kind": "categorical"}},
            "biological": biology,
            "perturbation": {"perturbation": {"kind": "categorical"}},
        },
        "context_columns": context or [],
        "date_column": None,
        "target_gene": None,
    }
    return Data.model_validate(record | changes)


def table(groups: dict[str, int], study: str = "one") -> pd.DataFrame:
    """Samples of one study, so many of each perturbation."""
    names = [name for name, number in groups.items() for _ in range(number)]
    return pd.DataFrame(
        {
            "sample_id": [f"{study}_{index:05d}" for index in range(len(names))],
            "study": study,
            "perturbation": names,
        }
    )


def genes(number: int) -> np.ndarray:
    return np.array([f"gene_{index}" for index in range(number)])


def drawn(
    samples: pd.DataFrame,
    means: np.ndarray,
    dispersion,
    rng: np.random.Generator,
    spread: float = 0.3,
) -> tuple[np.ndarray, np.ndarray]:
    """(counts (N, G), totals (N,)) of libraries of different size with these means (G,) or (N, G) at the typical one."""
    means = np.broadcast_to(means, (len(samples), np.shape(means)[-1]))
    sizes = means.sum(axis=1) * rng.lognormal(0, spread, len(samples))
    counts = draw_counts(
        np.log(means / means.sum(axis=1, keepdims=True)),
        sizes,
        np.broadcast_to(dispersion, means.shape[1]),
        rng,
    )
    return counts, counts.sum(axis=1)


def of(
    samples: pd.DataFrame,
    counts: np.ndarray,
    totals: np.ndarray,
    data: Data | None = None,
    targets: pd.DataFrame | None = None,
) -> CohortStatistics:
    return portrait(
        counts, totals, samples, genes(counts.shape[1]), data or declared(), targets, seed=0
    )


# --- variation between replicates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bcv", [0.1, 0.4])
def test_negative_binomial_counts_of_known_dispersion_have_that_bcv(rng, bcv):
    samples = table({"control": 30, "drug": 30})
    found = of(samples, *drawn(samples, rng.uniform(50, 5000, 400), bcv**2, rng))
    assert found.bcv.value == pytest.approx(bcv, rel=0.03)
    np.testing.assert_allclose(found.bcv_curve.value, bcv, rtol=0.08)


def test_the_bcv_of_poisson_counts_is_small_at_every_mean(rng):
    samples = table({"control": 200})
    found = of(samples, *drawn(samples, 10 ** rng.uniform(1, 4, 400), 1e-6, rng))
    assert found.bcv.value < 0.03


def test_the_bcv_does_not_see_differences_between_conditions(rng):
    samples = table({"control": 30, "drug": 30})
    means = np.where(
        (samples["perturbation"] == "drug").to_numpy()[:, None], 3.0, 1.0
    ) * rng.uniform(100, 1000, (1, 300))
    means[:, :150] = means[
        0, :150
    ]  # half of the genes do not move, so that totals do not hide what moves
    assert of(samples, *drawn(samples, means, 0.04, rng)).bcv.value == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize(("freedom", "scatter"), [(None, 0.0), (3, 0.48)])
def test_the_scatter_of_the_bcv_is_that_of_the_dispersions_and_not_of_their_estimation(
    rng, freedom, scatter
):
    # ln(chi2_f) has variance trigamma(f / 2); the BCV is the square root: sqrt(0.93) / 2 = 0.48 for 3 degrees.
    samples = table({"control": 12, "drug": 12})
    dispersion = 0.04 * (freedom / rng.chisquare(freedom, 3000) if freedom else np.ones(3000))
    found = of(samples, *drawn(samples, np.full(3000, 2000.0), dispersion, rng))
    assert found.bcv_scatter.value == pytest.approx(scatter, abs=0.06)


# --- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicates", [2, 50])
def test_poisson_counts_have_poissons_zeros_however_few_the_replicates(rng, replicates):
    samples = pd.concat(
        [table({"control": replicates}, f"study_{index}") for index in range(300 // replicates)],
        ignore_index=True,
    )
    found = of(samples, *drawn(samples, 10 ** rng.uniform(-1, 1, 1000), 1e-9, rng))
    assert found.zero_excess.value == pytest.approx(0, abs=0.002)
    np.testing.assert_allclose(found.zero_curve.value, found.zero_curve.poisson, atol=0.01)


def test_dispersed_counts_have_more_zeros_than_poissons(rng):
    samples = table({"control": 100})
    found = of(samples, *drawn(samples, np.full(500, 2.0), 1.0, rng))
    # Negative binomial with mean 2 and dispersion 1: 1 / 3; Poisson: exp(-2). Unequal totals add to both.
    assert found.zero_share.value == pytest.approx(1 / 3, abs=0.02)
    assert found.zero_excess.value == pytest.approx(1 / 3 - np.exp(-2), abs=0.02)


# --- libraries and replicates ---------------------------------------------------------------------------------------


def test_library_sizes_are_those_of_all_samples_not_only_of_the_measured(rng, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 20)
    samples = table({"control": 40, "drug": 40})
    counts, totals = drawn(samples, np.full(50, 100.0), 0.01, rng)
    found = of(samples, counts, totals)
    assert (found.samples, found.measured) == (80, 20)
    assert found.library_size.value == np.median(totals)
    assert found.library_variation.value == pytest.approx(totals.std() / totals.mean())


def test_replicates_that_are_equal_correlate_perfectly_and_unrelated_ones_not(rng):
    samples = table({"control": 20})
    profile = rng.integers(1, 1000, 500)
    same = np.tile(profile, (20, 1))
    found = of(samples, same, same.sum(axis=1))
    assert found.replicate_pearson.value == pytest.approx(1)
    assert found.replicate_spearman.value == pytest.approx(1)
    unrelated = rng.integers(1, 1000, (20, 500))
    assert abs(of(samples, unrelated, unrelated.sum(axis=1)).replicate_pearson.value) < 0.1


# --- perturbations --------------------------------------------------------------------------------------------------


def test_without_any_effect_hardly_a_gene_is_differential(rng):
    samples = table({"control": 8} | {f"drug_{index}": 4 for index in range(50)})
    found = of(samples, *drawn(samples, rng.uniform(50, 5000, 500), 0.04, rng))
    assert found.differential_share.over == 50
    assert found.differential_share.value <= module.FDR
    assert found.differential_share.quantiles[-1] <= module.FDR


def test_genes_that_move_are_the_differential_share(rng):
    samples = table({"control": 10, "drug": 10})
    means = np.full((20, 1000), 500.0)
    means[10:, :100] += 400
    means[10:, 100:200] -= 400  # as much down as up: else every share of the total would move
    found = of(samples, *drawn(samples, means, 0.01, rng))
    assert found.differential_share.value == pytest.approx(0.2, abs=0.02)


def test_a_strong_knock_down_moves_its_target_most_and_an_idle_one_does_not(rng):
    samples = table({"control": 10, "strong": 5, "idle": 5})
    means = np.full((20, 300), 500.0)
    means[10:15, 7] /= 8
    targets = pd.DataFrame({"perturbation": ["strong", "idle"], "gene_id": ["gene_7", "gene_8"]})
    found = of(samples, *drawn(samples, means, 0.01, rng), targets=targets)
    assert (found.target_first.value, found.target_first.over) == (0.5, 2)
    strong = of(samples, *drawn(samples, means, 0.01, rng), targets=targets[:1])
    assert strong.target_first.value == strong.target_top.value == 1
    assert strong.target_fold.value == pytest.approx(8, rel=0.2)
    assert strong.target_rank.value == 1 / 300


def test_a_perturbation_is_compared_with_the_controls_of_its_own_study_and_context(rng):
    parts = [
        table({"control": 4, "drug": 4}, "one"),
        table({"control": 4}, "two"),
        table({"drug": 4}, "three"),
    ]
    samples = pd.concat(parts, ignore_index=True).assign(
        tissue=["a"] * 8 + ["a"] * 2 + ["b"] * 2 + ["a"] * 4
    )
    (treated, control), *others = Groups(samples, declared(["tissue"])).contrasts()
    assert not others
    assert treated.tolist() == [4, 5, 6, 7]
    assert control.tolist() == [0, 1, 2, 3]


# --- what does not apply --------------------------------------------------------------------------------------------


def test_what_does_not_apply_is_null_with_a_reason(rng):
    alone = table({"control": 1, "drug": 1})
    found = of(alone, *drawn(alone, np.full(50, 100.0), 0.01, rng))
    for name in (
        "bcv",
        "bcv_scatter",
        "zero_excess",
        "replicate_pearson",
        "replicate_spearman",
        "differential_share",
        "target_first",
    ):
        number = getattr(found, name)
        assert number.value is None
        assert number.reason, name
    assert found.bcv_curve == found.zero_curve == Curve((), (), (), (), ())
    assert "no target genes" in found.target_rank.reason
    uncontrolled = table({"drug": 6})
    without = of(
        uncontrolled,
        *drawn(uncontrolled, np.full(50, 100.0), 0.01, rng),
        data=declared(control=None),
    )
    assert without.differential_share.value is None
    assert without.replicate_pearson.value is not None


def test_a_target_that_is_not_measured_is_null_with_a_reason(rng):
    samples = table({"control": 5, "drug": 5})
    targets = pd.DataFrame({"perturbation": ["drug"], "gene_id": ["elsewhere"]})
    found = of(samples, *drawn(samples, np.full(50, 100.0), 0.01, rng), targets=targets)
    assert found.target_first.value is None
    assert "measured target" in found.target_first.reason


def test_samples_without_counts_are_left_out(rng):
    samples = table({"control": 6, "drug": 6})
    counts, _ = drawn(samples, np.full(50, 100.0), 0.01, rng)
    counts[0] = 0
    found = of(samples, counts, counts.sum(axis=1))
    assert (found.samples, found.measured) == (12, 11)
    assert found.library_size.quantiles[0] > 0


# --- sampling and order ---------------------------------------------------------------------------------------------


def test_the_order_of_the_samples_does_not_matter(rng, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 60)
    samples = pd.concat(
        [table({"control": 9, "drug": 5, "guide": 6}, f"study_{index}") for index in range(6)],
        ignore_index=True,
    )
    counts, totals = drawn(samples, rng.uniform(1, 500, 200), 0.04, rng)
    targets = pd.DataFrame({"perturbation": ["guide"], "gene_id": ["gene_3"]})
    order = rng.permutation(len(samples))
    shuffled = of(
        samples.iloc[order].reset_index(drop=True), counts[order], totals[order], targets=targets
    )
    assert shuffled == of(samples, counts, totals, targets=targets)


def test_at_most_so_many_samples_are_measured_and_large_groups_are_thinned():
    many = pd.concat(
        [table({"control": 60, "drug": 40}, f"study_{index:03d}") for index in range(50)],
        ignore_index=True,
    )
    rows = measured_rows(many, declared(), 0)
    assert len(rows) == len(set(rows.tolist())) == SAMPLES
    assert many.iloc[rows].groupby("study").size().tolist() == [100] * 20, (
        "whole studies, so that treated samples keep their controls"
    )
    assert not np.array_equal(rows, measured_rows(many, declared(), 1))
    screen = table({"control": 5000} | {f"guide_{index:02d}": 50 for index in range(10)})
    assert (
        screen.iloc[measured_rows(screen, declared(), 0)]["perturbation"].value_counts()["control"]
        == module.GROUP
    )


def test_a_source_read_in_chunks_has_the_portrait_of_its_counts_in_memory(source_folder, params):
    data = params.override({"data.source": str(source_folder)}).data
    source = open_source(data)
    counts = np.concatenate([block for _, block in source.chunks()])
    order = np.concatenate([rows for rows, _ in source.chunks()])
    targets = pd.read_parquet(source_folder / "targets.parquet")
    in_memory = portrait(
        counts,
        counts.sum(axis=1),
        source.samples.iloc[order],
        source.genes["gene_id"].to_numpy(),
        data,
        targets,
        0,
    )
    assert portrait_of(source, data, targets, 0) == in_memory


# --- table, file and figure -----------------------------------------------------------------------------------------


def test_a_portrait_survives_its_file():
    for found in real_portraits().values():
        assert CohortStatistics.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_the_table_has_a_row_for_every_quantity_and_a_column_for_every_cohort():
    real = real_portraits()
    found = comparison_table(real)
    assert found["quantity"].tolist() == list(QUANTITIES)
    assert set(real) <= set(found.columns)
    assert found.notna().all(axis=None)
    cells = found.set_index("quantity")
    assert cells.loc["target_first", "airway"] == "– (no target genes are known)"
    assert cells.loc["library_size", "yeast_snf2"].startswith("8,3")
    assert (cells["source"] != "").equals(cells["published"] != "")
    assert set(PUBLISHED) <= set(QUANTITIES) <= {field.name for field in fields(CohortStatistics)}


def test_the_figure_is_drawn_also_of_what_does_not_apply_and_is_the_same_twice(rng, tmp_path):
    alone = table({"control": 1, "drug": 1})
    portraits = {
        "mine": of(alone, *drawn(alone, np.full(50, 100.0), 0.01, rng)),
        **real_portraits(),
    }
    for name in ("first.png", "again.png"):
        credibility(portraits, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "first.png").stat().st_size > 20_000


# --- the simulator against real cohorts -----------------------------------------------------------------------------

# How far a simulated bulk cohort may lie outside the range of the real ones: (factor, or absolute where a difference says more).
BANDS = {
    "gene_mean": 2.0,
    "bcv": 1.3,
    "bcv_scatter": 1.5,
    "zero_share": 1.5,
    "library_size": 1.5,
    "library_variation": 1.5,
    "replicate_pearson": 1.01,
    "replicate_spearman": 1.02,
    "differential_share": 1.0,
    "target_first": 2.0,
}
# What is known to differ. An entry that is no longer needed may go; one that is needed and not here fails.
DIFFERS = {
    "gene_mean": "the counts of a whole library fall on 1,000 genes instead of some 20,000 (synthesize.depth 500000 would be their share)",
    "zero_share": "the same: hardly a gene has few counts",
    "bcv_scatter": "Splatter's chi-squared of 60 degrees, and one spread of donors for all genes; real dispersions scatter as if there were 3",
    "target_first": "a perturbation without effect does not move its target either, and programs of up to fivefold compete with a target of eightfold",
}


def test_a_simulated_bulk_cohort_lies_in_the_bands_of_the_real_ones_where_it_is_not_said_to_differ(
    tmp_path,
):
    from pipeline.synthesize import write_source

    params = read_params(ROOT / "params.yaml").override(
        {"synthesize.samples": 2000, "synthesize.studies": 8, "data.source": str(tmp_path)}
    )
    write_source(params.synthesize, tmp_path)
    found = portrait_of(
        open_source(params.data), params.data, pd.read_parquet(tmp_path / "targets.parquet"), 0
    )
    outside = {}
    for name, factor in BANDS.items():
        real = [
            number.value
            for one in real_portraits().values()
            if (number := getattr(one, name)).value is not None
        ]
        value = getattr(found, name).value
        if not min(real) / factor <= value <= max(real) * factor:
            outside[name] = (value, real)
    assert set(outside) <= set(DIFFERS), outside


def measured_real() -> dict[str, CohortStatistics]:
    """The portraits of real_portraits(), measured again. Airway's donors are its replicates, not contexts."""
    yeast = declared(["organism_strain"], source=str(SHARED_DATA / "yeast_snf2.h5ad"))
    airway = declared(source=str(SHARED_DATA / "airway.h5ad"))
    snf2 = pd.DataFrame({"perturbation": ["snf2"], "gene_id": ["YOR290C"]})
    return {
        "yeast_snf2": portrait_of(open_source(yeast), yeast, snf2, 0),
        "airway": portrait_of(open_source(airway), airway, None, 0),
    }


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real cohorts are not on this machine")
def test_the_committed_portraits_of_real_cohorts_are_what_this_code_measures():
    committed, measured = real_portraits(), measured_real()
    assert list(committed) == list(measured)
    for name, found in measured.items():
        for field in fields(CohortStatistics):
            was, now = getattr(committed[name], field.name), getattr(found, field.name)
            for part, value in (
                asdict(now).items() if isinstance(now, Number | Curve) else {"": now}.items()
            ):
                expected = getattr(was, part) if part else was
                if value is None or isinstance(value, str):
                    assert value == expected, (name, field.name)
                else:
                    np.testing.assert_allclose(
                        value,
                        expected,
                        rtol=1e-6,
                        atol=1e-9,
                        err_msg=f"{name}: {field.name}: {part}",
                    )
