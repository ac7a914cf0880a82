"""Study design: conditions and controls of each study, and the recorded metadata."""

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from pipeline.gem.common.config import read_params
from pipeline.gem.simulation.generator import draw_truth
from pipeline.gem.simulation.study_design import draw_design
from pipeline.gem.simulation.truth import CONTROL, DISEASES, SEXES, index_of


def draw(settings, **changes):
    """(truth, design)"""
    settings = settings.model_copy(update=changes)
    rng = np.random.default_rng(3)
    truth = draw_truth(settings, rng)
    return truth, draw_design(settings, truth, rng)


@pytest.fixture(scope="module")
def large(params):
    """(truth, design) of many studies and samples over few genes, for shares and frequencies."""
    return draw(params.synthesize, samples=20_000, studies=400, genes=20)


def of_strata(name: str, truth, design) -> np.ndarray:
    """(N,) a field of the truth by study and stratum."""
    return getattr(truth, name)[index_of(design.samples["study"], truth.studies), design.stratum]


def test_ages_are_missing_more_often_with_age_at_the_declared_rate(large):
    truth, design = large
    age, missing = of_strata("stratum_age", *large), design.samples["age_years"].isna().to_numpy()
    error = np.sqrt(0.25 * 0.75 / len(missing))
    error += 0.25 / 60 * age.std() / np.sqrt(truth.stratum_age.size)
    assert missing.mean() == pytest.approx(float(truth.missing_age), abs=4.5 * error)
    expected, rates = truth.age_missing_probability(age), []
    for low, high in ((20, 40), (40, 60), (60, 81)):
        inside = (age >= low) & (age < high)
        rates.append(missing[inside].mean())
        error = 0.5 / np.sqrt(inside.sum())
        assert rates[-1] == pytest.approx(expected[inside].mean(), abs=4.5 * error)
    assert rates[0] < rates[1] < rates[2]


def test_sex_is_missing_and_wrong_at_the_declared_rates(large):
    truth, design = large
    sex, recorded = of_strata("stratum_sex", *large), design.samples["sex"]
    error = 0.4 / np.sqrt(len(recorded))
    assert recorded.isna().mean() == pytest.approx(float(truth.missing_sex), abs=4.5 * error)
    present = recorded.notna().to_numpy()
    wrong = index_of(recorded[present], SEXES) != sex[present]
    error = 0.1 / np.sqrt(present.sum())
    assert wrong.mean() == pytest.approx(float(truth.wrong_sex), abs=4.5 * error)


def test_recorded_ages_and_diseases_are_those_of_the_stratum(large):
    samples, ages = large[1].samples, of_strata("stratum_age", *large)
    present = samples["age_years"].notna().to_numpy()
    np.testing.assert_array_equal(samples["age_years"].to_numpy()[present], ages[present])
    diseases = np.array(DISEASES)[of_strata("stratum_disease", *large)]
    np.testing.assert_array_equal(samples["disease"].to_numpy(), diseases)


def test_every_context_of_a_study_has_controls(large):
    samples = large[1].samples
    context = [samples["study"], samples["tissue"], samples["cell_type"]]
    assert (samples["perturbation"] == CONTROL).groupby(context).any().all()


def test_only_compounds_have_a_dose_and_only_controls_have_no_time(large):
    samples = large[1].samples
    is_compound = samples["perturbation_type"] == "compound"
    assert (samples["perturbation_dose"].notna() == is_compound).all()
    assert (samples["perturbation_time"].isna() == (samples["perturbation"] == CONTROL)).all()


def test_a_study_has_one_date_and_one_protocol_and_dates_are_in_order(large):
    samples = large[1].samples
    constant = ["study_date", "library_selection", "library_layout", "platform"]
    assert (samples.groupby("study")[constant].nunique() == 1).all(axis=None)
    dates = samples.drop_duplicates("study").sort_values("study")["study_date"]
    assert dates.is_monotonic_increasing
    assert pd.to_datetime(dates).between("2013-01-01", "2024-12-31").all()


@pytest.mark.parametrize(
    "changes", [{}, {"samples": 50, "studies": 40, "contexts_per_study": 2}], ids=["tiny", "thin"]
)
def test_the_design_has_the_declared_number_of_samples_with_unique_names(params, changes):
    _, design = draw(params.synthesize, **changes)
    number = (params.synthesize.model_copy(update=changes)).samples
    assert design.samples["sample_id"].nunique() == len(design.samples) == number
    assert len(design.stratum) == len(design.donor) == len(design.library_size) == number


@pytest.mark.parametrize(
    ("preset", "depth", "low", "high", "median"),
    [
        ("bulk", None, 0.7e7, 1.4e7, 1.05e7),
        ("single_cell", None, 60 * np.exp(-1), 60 * np.exp(1), 60),  # 2e4 x 60 / 20,000 genes
        ("bulk", 300_000, 210_000, 420_000, 315_000),
    ],
)
def test_library_sizes_follow_the_preset_or_the_depth(params, preset, depth, low, high, median):
    sizes = draw(params.synthesize, preset=preset, depth=depth)[1].library_size
    assert low <= sizes.min() and sizes.max() <= high
    assert np.median(sizes) == pytest.approx(median, rel=0.06)


def test_depth_differs_between_studies_by_the_declared_spread(params):
    truth, design = draw(params.synthesize, studies=300, samples=9000, genes=20, depth_spread=0.8)
    log_size = pd.Series(np.log(design.library_size))
    by_study = log_size.groupby(index_of(design.samples["study"], truth.studies))
    assert by_study.mean().std() == pytest.approx(0.8, rel=0.15)
    # Within a study the sizes are uniform between 0.7 and 1.4 times the typical one.
    assert (by_study.max() - by_study.min()).max() <= np.log(2) + 1e-9


def test_the_declared_share_of_treatments_are_two_perturbations(params):
    truth, design = draw(params.synthesize, studies=200, samples=20_000, genes=20, double_share=0.3)
    treated = design.samples[design.samples["perturbation"] != CONTROL]
    by_study = treated.drop_duplicates(["study", "perturbation"])
    doubles = by_study["perturbation"].str.contains("|", regex=False)
    assert doubles.mean() == pytest.approx(0.3, abs=4.5 * np.sqrt(0.21 / len(by_study)))
    kinds = dict(zip(truth.perturbations, truth.perturbation_type, strict=True))
    for row in by_study.itertuples():
        names = row.perturbation.split("|")
        assert names == sorted(names)
        own = {str(kinds[name]) for name in names}
        assert row.perturbation_type == "|".join(sorted(own))
        assert (row.perturbation_dose is not None) == ("compound" in own)
    for _, rows in by_study[doubles].groupby("study"):
        assert not rows["perturbation"].duplicated().any()


def test_subpopulations_of_cells_have_the_shares_of_their_context(params):
    truth, design = draw(params.synthesize, samples=20_000, genes=20, subpopulations=3)
    context = truth.context_index(design.samples)
    for index, shares in enumerate(truth.subpopulation_share):
        own = design.subpopulation[context == index]
        found = np.bincount(own, minlength=3) / len(own)
        assert (np.abs(found - shares) < 4.5 * np.sqrt(0.25 / len(own))).all()
    assert draw(params.synthesize)[1].subpopulation is None


def test_the_default_cohort_has_confounded_studies_replicates_and_missing_metadata():
    params = read_params(ROOT / "params.yaml").synthesize
    rng = np.random.default_rng(params.seed)
    samples = draw_design(params, draw_truth(params, rng), rng).samples
    assert len(samples) == params.samples == 12000
    assert 0.18 <= samples["sex"].isna().mean() <= 0.22
    assert 0.2 <= samples["age_years"].isna().mean() <= 0.3
    assert samples.groupby("study")["tissue"].nunique().max() < params.tissues
    condition = ["study", "tissue", "cell_type", "perturbation"]
    condition += ["perturbation_dose", "perturbation_time"]
    treated = samples[samples["perturbation"] != CONTROL]
    assert treated.groupby(condition, dropna=False).size().min() >= 3
