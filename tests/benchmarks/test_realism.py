"""Realism statistics: each against known counts, and the simulator against real cohorts."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT, SHARED_DATA

from benchmarks import realism, realism_statistics
from benchmarks.cohorts.declarations import read_task
from benchmarks.realism import STATISTICS, comparison_table, real_cohorts
from benchmarks.realism_figure import draw
from benchmarks.realism_statistics import (
    SAMPLES,
    CohortStatistics,
    CountTable,
    Curve,
    ReplicateGroups,
    cohort_statistics,
    measured_rows,
)
from pipeline.gem.common.config import Data, read_params
from pipeline.gem.data.sources import open_source
from pipeline.gem.simulation.generator import draw_counts


def declarations(context: tuple[str, ...] = (), **changes) -> Data:
    """A cohort with studies and one perturbation column; `changes` as in params.yaml."""
    categorical = {"kind": "categorical"}
    covariates = {
        "technical": {"study": categorical},
        "biological": dict.fromkeys(context, categorical),
        "perturbation": {"perturbation": categorical},
    }
    own = {"covariates": covariates, "context_columns": context, "date_column": None}
    default = read_params(ROOT / "params.yaml").data.model_dump()
    return Data.model_validate(default | own | {"target_gene": None} | changes)


def sample_table(groups: dict[str, int], study: str = "one") -> pd.DataFrame:
    """Samples of one study: a number per perturbation."""
    names = [name for name, number in groups.items() for _ in range(number)]
    ids = [f"{study}_{index:05d}" for index in range(len(names))]
    return pd.DataFrame({"sample_id": ids, "study": study, "perturbation": names})


def count_table(samples: pd.DataFrame, counts: np.ndarray, **changes) -> CountTable:
    genes = np.array([f"gene_{index}" for index in range(counts.shape[1])])
    table = CountTable(counts, counts.sum(axis=1), samples, genes, declarations())
    return replace(table, **changes)


def simulated(
    samples: pd.DataFrame, means: np.ndarray, dispersion, rng: np.random.Generator
) -> CountTable:
    """Negative binomial counts of libraries of different size, with these means (G,) or (N, G) at
    the typical size."""
    means = np.broadcast_to(means, (len(samples), np.shape(means)[-1]))
    sizes = means.sum(axis=1) * rng.lognormal(0, 0.3, len(samples))
    log_fractions = np.log(means / means.sum(axis=1, keepdims=True))
    dispersions = np.broadcast_to(dispersion, means.shape[1])
    return count_table(samples, draw_counts(log_fractions, sizes, dispersions, rng))


def measure(table: CountTable) -> CohortStatistics:
    return cohort_statistics(table, seed=0)


# --- variation between replicates -----------------------------------------------------------------


@pytest.mark.parametrize("bcv", [0.1, 0.4])
def test_negative_binomial_counts_have_the_bcv_of_their_dispersion(rng, bcv):
    samples = sample_table({"control": 200})
    statistics = measure(simulated(samples, rng.uniform(100, 5000, 400), bcv**2, rng))
    assert statistics.bcv.value == pytest.approx(bcv, rel=0.03)
    np.testing.assert_allclose(statistics.bcv_curve.value, bcv, rtol=0.08)


def test_the_bcv_excludes_poisson_noise_and_differences_between_conditions(rng):
    poisson = simulated(sample_table({"control": 200}), 10 ** rng.uniform(1, 4, 400), 1e-6, rng)
    assert measure(poisson).bcv.value < 0.03
    samples = sample_table({"control": 30, "drug": 30})
    treated = (samples["perturbation"] == "drug").to_numpy()[:, None]
    means = np.where(treated, 3.0, 1.0) * rng.uniform(100, 1000, (1, 300))
    means[:, :150] = means[0, :150]  # unchanged genes keep the totals from hiding the change
    bcv = measure(simulated(samples, means, 0.04, rng)).bcv.value
    assert bcv == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize(("freedom", "scatter"), [(None, 0.0), (3, 0.48)])
def test_the_scatter_of_the_bcv_is_corrected_for_estimation_error(rng, freedom, scatter):
    # ln(chi2_f) has variance trigamma(f / 2); the BCV is the square root: sqrt(0.93) / 2 = 0.48
    # for 3 degrees of freedom.
    samples = sample_table({"control": 12, "drug": 12})
    spread = freedom / rng.chisquare(freedom, 3000) if freedom else np.ones(3000)
    statistics = measure(simulated(samples, np.full(3000, 2000.0), 0.04 * spread, rng))
    assert statistics.bcv_scatter.value == pytest.approx(scatter, abs=0.06)


# --- zeros ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicates", [2, 50])
def test_poisson_counts_have_no_excess_zeros_with_any_number_of_replicates(rng, replicates):
    studies = range(300 // replicates)
    tables = [sample_table({"control": replicates}, f"study_{index}") for index in studies]
    samples = pd.concat(tables, ignore_index=True)
    statistics = measure(simulated(samples, 10 ** rng.uniform(-1, 1, 1000), 1e-9, rng))
    assert statistics.zero_excess.value == pytest.approx(0, abs=0.002)
    curve = statistics.zero_curve
    np.testing.assert_allclose(curve.value, curve.poisson, atol=0.01)


def test_overdispersed_counts_have_excess_zeros(rng):
    samples = sample_table({"control": 100})
    statistics = measure(simulated(samples, np.full(500, 2.0), 1.0, rng))
    # Mean 2 and dispersion 1: 1 / 3; Poisson: exp(-2). Unequal totals add to both.
    assert statistics.zero_share.value == pytest.approx(1 / 3, abs=0.02)
    assert statistics.zero_excess.value == pytest.approx(1 / 3 - np.exp(-2), abs=0.02)


# --- libraries and replicates ---------------------------------------------------------------------


def test_library_sizes_are_of_all_samples_with_counts(rng, monkeypatch):
    monkeypatch.setattr(realism_statistics, "SAMPLES", 20)
    samples = sample_table({"control": 40, "drug": 40})
    table = simulated(samples, np.full(50, 100.0), 0.01, rng)
    table.counts[0] = 0
    totals = table.counts.sum(axis=1)
    statistics = measure(replace(table, totals=totals))
    assert (statistics.samples, statistics.measured) in ((80, 20), (80, 19))
    assert statistics.library_size.value == np.median(totals[1:])
    variation = totals[1:].std() / totals[1:].mean()
    assert statistics.library_variation.value == pytest.approx(variation)


def test_identical_replicates_correlate_perfectly_and_unrelated_ones_do_not(rng):
    samples = sample_table({"control": 20})
    identical = measure(count_table(samples, np.tile(rng.integers(1, 1000, 500), (20, 1))))
    assert identical.replicate_pearson.value == pytest.approx(1)
    assert identical.replicate_spearman.value == pytest.approx(1)
    unrelated = measure(count_table(samples, rng.integers(1, 1000, (20, 500))))
    assert abs(unrelated.replicate_pearson.value) < 0.1


# --- perturbations --------------------------------------------------------------------------------


def test_without_effects_differential_genes_stay_below_the_fdr(rng):
    samples = sample_table({"control": 8} | {f"drug_{index}": 4 for index in range(50)})
    share = measure(simulated(samples, rng.uniform(50, 5000, 500), 0.04, rng)).differential_share
    assert share.n == 50
    assert share.value <= realism_statistics.FDR and share.quantiles[-1] <= realism_statistics.FDR


def test_the_differential_share_is_the_share_of_changed_genes(rng):
    samples = sample_table({"control": 10, "drug": 10})
    means = np.full((20, 1000), 500.0)
    means[10:, :100] += 400
    means[10:, 100:200] -= 400  # as much down as up: otherwise every share of the total changes
    share = measure(simulated(samples, means, 0.01, rng)).differential_share
    assert share.value == pytest.approx(0.2, abs=0.02)


def test_a_strong_knock_down_changes_its_target_most(rng):
    samples = sample_table({"control": 10, "strong": 5, "idle": 5})
    means = np.full((20, 300), 500.0)
    means[10:15, 7] /= 8
    targets = pd.DataFrame({"perturbation": ["strong", "idle"], "gene_id": ["gene_7", "gene_8"]})
    table = simulated(samples, means, 0.01, rng)
    both = measure(replace(table, targets=targets))
    assert (both.target_first.value, both.target_first.n) == (0.5, 2)
    strong = measure(replace(table, targets=targets[:1]))
    assert strong.target_first.value == strong.target_top.value == 1
    assert strong.target_fold.value == pytest.approx(8, rel=0.2)
    assert strong.target_rank.value == 1 / 300


def test_a_contrast_uses_the_controls_of_its_study_and_context():
    studies = (("one", {"control": 4, "drug": 4}), ("two", {"control": 4}), ("three", {"drug": 4}))
    samples = pd.concat([sample_table(groups, study) for study, groups in studies])
    samples["tissue"] = ["a"] * 8 + ["a"] * 2 + ["b"] * 2 + ["a"] * 4
    contrasts = list(ReplicateGroups(samples, declarations(("tissue",))).contrasts())
    assert [[rows.tolist() for rows in pair] for pair in contrasts] == [
        [[4, 5, 6, 7], [0, 1, 2, 3]]
    ]


# --- contexts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_correlation_between_contexts_has_no_noise(rng, share, noise):
    """Of effects of which this share of the variance is of one context; a factor of the context
    and the noise of replicates do not count."""
    tables = [
        sample_table({"control": 6, "drug": 6, "idle": 6}, "one").assign(tissue=tissue)
        for tissue in ("a", "b", "c")
    ]
    samples = pd.concat(tables, ignore_index=True)
    samples["sample_id"] = [f"s{index:03d}" for index in range(len(samples))]
    genes, drug = 4000, (samples["perturbation"] == "drug").to_numpy()
    expression, shared = 5 + noise * rng.normal(size=(len(samples), genes)), rng.normal(size=genes)
    for tissue, factor in (("a", 1.0), ("b", 0.6), ("c", 1.5)):
        own = rng.normal(size=genes)
        effect = factor * (np.sqrt(1 - share) * shared + np.sqrt(share) * own)
        expression[drug & (samples["tissue"] == tissue).to_numpy()] += effect
    data = declarations(("tissue",))
    found = realism_statistics.context_correlation(expression, samples, data, 0)
    assert found.n == 3  # the idle one has no effect in any context
    assert found.value == pytest.approx(1 - share, abs=0.05)


def test_an_effect_is_measured_against_controls_of_its_time(rng):
    """What changes with time in controls too is no effect."""
    table = sample_table({"control": 4, "drug": 4})
    table["perturbation_time"] = ["1 h", "1 h", "9 h", "9 h"] * 2
    samples = pd.concat([table.assign(tissue=tissue) for tissue in "ab"], ignore_index=True)
    late = (samples["perturbation_time"] == "9 h").to_numpy()[:, None]
    drug = (samples["perturbation"] == "drug").to_numpy()[:, None]
    effects = np.where(
        (samples["tissue"] == "a").to_numpy()[:, None], *rng.normal(size=(2, 1, 3000))
    )
    expression = 0.01 * rng.normal(size=(8 * 2, 3000)) + late * rng.normal(size=3000) * 5
    expression += drug * effects
    covariates = declarations(("tissue",)).covariates.model_dump()
    covariates["perturbation"]["perturbation_time"] = {"kind": "numeric", "scale": "log"}
    data = declarations(("tissue",), covariates=covariates)
    found = realism_statistics.context_correlation(expression, samples, data, 0)
    assert found.n == 2 and abs(found.value) < 0.1


# --- missing values -------------------------------------------------------------------------------


def test_statistics_without_data_are_none_with_a_reason(rng):
    samples = sample_table({"control": 1, "drug": 1})
    statistics = measure(simulated(samples, np.full(50, 100.0), 0.01, rng))
    empty = {name for name in STATISTICS if getattr(statistics, name).value is None}
    expected = {"bcv", "bcv_scatter", "zero_excess", "differential_share", "context_correlation"}
    assert empty == expected | {
        name for name in STATISTICS if name.startswith(("replicate_", "target_"))
    }
    assert all(getattr(statistics, name).reason for name in empty)
    assert statistics.bcv_curve == statistics.zero_curve == Curve()
    assert "no target genes" in statistics.target_rank.reason
    uncontrolled = simulated(sample_table({"drug": 6}), np.full(50, 100.0), 0.01, rng)
    statistics = measure(replace(uncontrolled, data=declarations(control=None)))
    assert statistics.differential_share.value is None
    assert statistics.replicate_pearson.value is not None


def test_a_target_that_is_not_measured_is_none_with_a_reason(rng):
    table = simulated(sample_table({"control": 5, "drug": 5}), np.full(50, 100.0), 0.01, rng)
    targets = pd.DataFrame({"perturbation": ["drug"], "gene_id": ["other"]})
    first = measure(replace(table, targets=targets)).target_first
    assert first.value is None and "measured target" in first.reason


# --- sampling and order ---------------------------------------------------------------------------


def test_statistics_do_not_depend_on_the_order_of_samples(rng, monkeypatch):
    monkeypatch.setattr(realism_statistics, "SAMPLES", 60)
    groups = {"control": 9, "drug": 5, "guide": 6}
    samples = pd.concat([sample_table(groups, f"study_{index}") for index in range(6)])
    targets = pd.DataFrame({"perturbation": ["guide"], "gene_id": ["gene_3"]})
    table = replace(simulated(samples, rng.uniform(1, 500, 200), 0.04, rng), targets=targets)
    order = rng.permutation(len(samples))
    parts = {name: getattr(table, name)[order] for name in ("counts", "totals")}
    shuffled = replace(table, samples=samples.iloc[order].reset_index(drop=True), **parts)
    assert measure(shuffled) == measure(table)


def test_whole_studies_are_measured_and_large_groups_thinned():
    groups = {"control": 60, "drug": 40}
    tables = [sample_table(groups, f"study_{index:03d}") for index in range(50)]
    samples = pd.concat(tables, ignore_index=True)
    rows = measured_rows(samples, declarations(), 0)
    assert len(rows) == len(set(rows.tolist())) == SAMPLES
    assert samples.iloc[rows].groupby("study").size().tolist() == [100] * 20
    assert not np.array_equal(rows, measured_rows(samples, declarations(), 1))
    screen = sample_table({"control": 5000} | {f"guide_{index:02d}": 50 for index in range(10)})
    measured = screen.iloc[measured_rows(screen, declarations(), 0)]["perturbation"]
    assert (measured == "control").sum() == realism_statistics.GROUP


# --- command, table, figure -----------------------------------------------------------------------


def test_the_command_writes_a_table_and_a_reproducible_figure(
    cohort, tmp_path, monkeypatch, capsys
):
    for name in ("first", "second"):
        options = [str(cohort.folder), "--output", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", ["realism", *options])
        realism.main()
    assert capsys.readouterr().out.startswith(f"| statistic | unit | {cohort.folder} | yeast_snf2")
    figure = (tmp_path / "first/realism.png").read_bytes()
    assert figure == (tmp_path / "second/realism.png").read_bytes() and len(figure) > 20_000
    table = pd.read_csv(tmp_path / "first/realism.csv")
    assert table["statistic"].tolist() == list(STATISTICS)


def test_the_table_has_a_row_per_statistic_and_a_column_per_cohort():
    real = real_cohorts()
    table = comparison_table(real).set_index("statistic")
    assert list(table.index) == list(STATISTICS) and set(real) <= set(table.columns)
    assert table.notna().all(axis=None)
    assert table.loc["target_first", "airway"] == "– (no target genes are known)"
    assert table.loc["library_size", "yeast_snf2"].startswith("8,383,552 (6,4")
    assert (table["source"] != "").equals(table["published"] != "")


def test_cohorts_without_replicates_are_drawn(rng, tmp_path):
    samples = sample_table({"control": 1, "drug": 1})
    statistics = measure(simulated(samples, np.full(50, 100.0), 0.01, rng))
    draw({"mine": statistics}, real_cohorts(), tmp_path / "realism.png")
    assert (tmp_path / "realism.png").stat().st_size > 20_000


# --- the simulator against real cohorts -----------------------------------------------------------

# By which factor a simulated bulk cohort may lie outside the range of the real ones.
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
# Known differences; docs/realism.md explains them.
DIFFERS = {"gene_mean", "zero_share", "bcv_scatter", "target_first"}


def source_statistics(data: Data, targets: pd.DataFrame | None) -> CohortStatistics:
    """Of a source as it is, without the gene filter of `prepare`."""
    source = open_source(data)
    counts = np.zeros((len(source.samples), len(source.genes)), dtype=np.uint32)
    for rows, block in source.chunks():
        counts[rows] = block
    genes = source.genes["gene_id"].to_numpy()
    return measure(
        CountTable(counts, counts.sum(axis=1), source.samples, genes, data, targets),
    )


def test_a_simulated_bulk_cohort_lies_near_the_real_ones_except_for_known_differences(tmp_path):
    from pipeline.gem.simulation.write import write_source

    size = {"synthesize.samples": 2000, "synthesize.studies": 8, "data.source": str(tmp_path)}
    params = read_params(ROOT / "params.yaml").override(size)
    write_source(params.synthesize, tmp_path)
    simulation = source_statistics(params.data, pd.read_parquet(tmp_path / "targets.parquet"))
    outside = {}
    for name, factor in BANDS.items():
        real = [getattr(cohort, name).value for cohort in real_cohorts().values()]
        real = [value for value in real if value is not None]
        value = getattr(simulation, name).value
        if not min(real) / factor <= value <= max(real) * factor:
            outside[name] = (value, real)
    assert set(outside) <= DIFFERS, outside


def flat(record: object, path: str = "") -> dict[str, object]:
    """Path to value of a nested JSON record."""
    if not isinstance(record, dict | list):
        return {path: record}
    items = record.items() if isinstance(record, dict) else enumerate(record)
    return {k: v for name, part in items for k, v in flat(part, f"{path}/{name}").items()}


def real_statistics() -> dict[str, CohortStatistics]:
    """Of the real cohorts, from their counts."""
    yeast = declarations(("organism_strain",), source=str(SHARED_DATA / "yeast_snf2.h5ad"))
    airway = declarations(source=str(SHARED_DATA / "airway.h5ad"))  # replicates: donors
    snf2 = pd.DataFrame({"perturbation": ["snf2"], "gene_id": ["YOR290C"]})
    defaults = read_params(ROOT / "params.yaml")
    contexts = {
        name: source_statistics(read_task(name, SHARED_DATA, defaults).params.data, None)
        for name in ("bmdm_mtb", "cglabrata_phosphate")
    }
    return {
        "yeast_snf2": source_statistics(yeast, snf2),
        "airway": source_statistics(airway, None),
    } | contexts


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real cohorts are not on this machine")
def test_the_stored_statistics_of_real_cohorts_are_reproduced():
    stored = flat(json.loads(realism.REAL.read_text()))
    records = {name: asdict(statistics) for name, statistics in real_statistics().items()}
    recomputed = flat(json.loads(json.dumps(records)))
    assert list(recomputed) == list(stored)
    for path, value in recomputed.items():
        exact = value is None or isinstance(value, str)
        expected = stored[path] if exact else pytest.approx(stored[path], rel=1e-6, abs=1e-9)
        assert value == expected, path


def test_every_statistic_of_the_table_is_measured():
    assert set(STATISTICS) <= {field.name for field in fields(CohortStatistics)}
    for name, record in json.loads(realism.REAL.read_text()).items():
        assert json.loads(json.dumps(asdict(real_cohorts()[name]))) == record
