"""The ideal predictors: closed forms, simulation of what is hidden by the simulator's rules, their order, their draws.

The simulation of hidden causes below is written anew from the rules of the simulator, slowly, one sample at a time.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.references import choose_references
from pipeline.gem.data.splits import is_control
from pipeline.gem.evaluation.baselines import Additive, Ridge, training_mean
from pipeline.gem.simulation import generator, hidden_factors
from pipeline.gem.simulation.generator import (
    DISEASES,
    SEXES,
    Truth,
    draw_counts,
    draw_truth,
    log_fractions,
)
from pipeline.gem.simulation.oracle import (
    MetadataOracle,
    OmniscientOracle,
    ReferenceOracle,
    Tables,
    _normaliser,
    true_effects,
    truly_changed,
)
from pipeline.gem.simulation.study_design import Design, draw_design, expected_log_fractions

DRAWS = 2000  # simulations of one sample
QUERIES = 4  # samples of each kind


@dataclass(frozen=True)
class World:
    """A small cohort with everything known about it."""

    truth: Truth
    design: Design
    log_fraction: np.ndarray
    counts: np.ndarray

    @classmethod
    def draw(cls, settings, seed: int, **changes) -> "World":
        """`changes` are of the truth."""
        rng = np.random.default_rng(seed)
        truth = replace(draw_truth(settings, rng), **changes)
        design = draw_design(settings, truth, rng)
        fractions = expected_log_fractions(truth, design, slice(None))
        return cls(
            truth,
            design,
            fractions,
            draw_counts(fractions, design.library_size, truth.dispersion, rng),
        )

    @property
    def samples(self) -> pd.DataFrame:
        return self.design.samples

    @property
    def totals(self) -> np.ndarray:
        return self.counts.sum(axis=1)

    @property
    def expression(self) -> np.ndarray:
        return np.log1p(1e6 * self.counts / self.totals[:, None])

    @property
    def omniscient(self) -> np.ndarray:
        return OmniscientOracle(Tables(self.truth)).predict(self.log_fraction, self.totals)

    def oracle(self, studies: bool = True, perturbations: bool = True) -> MetadataOracle:
        """Having seen all studies, or none; all perturbations, or none."""
        return MetadataOracle(
            self.truth,
            set(self.truth.studies if studies else ()),
            set(self.truth.perturbations if perturbations else ()),
        )

    def references(
        self, rows: np.ndarray | slice = slice(None)
    ) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
        """(metadata, stratum, donor) of another control of the study of each sample."""
        rng, study = np.random.default_rng(5), self.samples["study"].to_numpy()
        control = (self.samples["perturbation"] == "control").to_numpy()
        pools = {name: np.flatnonzero(control & (study == name)) for name in np.unique(study)}
        numbers = np.arange(len(study))[rows]
        chosen = np.array(
            [rng.choice(pools[study[row]][pools[study[row]] != row]) for row in numbers]
        )
        return self.samples.iloc[chosen], self.design.stratum[chosen], self.design.donor[chosen]


@pytest.fixture(scope="module")
def small(params):
    """Settings of a small cohort, to be changed."""
    changes = {"genes": 80, "samples": 1200, "perturbations": 12, "studies": 12, "wrong_sex": 0.1}
    return params.synthesize.model_copy(update=changes)


@pytest.fixture(scope="module", params=["bulk", "single_cell"])
def world(request, small) -> World:
    return World.draw(
        small.model_copy(
            update={
                "preset": request.param,
                "depth": {"bulk": None, "single_cell": 20_000}[request.param],
            }
        ),
        8,
    )


def complete(world: World) -> np.ndarray:
    """Rows whose sex and age are recorded."""
    return np.flatnonzero(world.samples["sex"].notna() & world.samples["age_years"].notna())


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_without_study_and_donor_effects_all_oracles_agree_on_what_is_fully_recorded(
    small, monkeypatch
):
    monkeypatch.setattr(hidden_factors, "STUDY_SCALE", 0.0)
    monkeypatch.setattr(hidden_factors, "DONOR_SCALE", 0.0)
    settings = small.model_copy(update={"wrong_sex": 0.0})
    nothing = World.draw(settings, 1).truth
    world = World.draw(settings, 1, study=0 * nothing.study, donor=0 * nothing.donor)
    rows = complete(world)
    samples, totals, unseen = (
        world.samples.iloc[rows],
        world.totals[rows],
        world.oracle(studies=False),
    )
    found = [
        world.oracle().predict(samples, totals),
        unseen.predict(samples, totals),
        ReferenceOracle(unseen).predict(samples, totals, *world.references(rows)),
    ]
    for predicted in found:
        np.testing.assert_allclose(predicted, world.omniscient[rows], atol=2e-5)


def test_with_one_donor_a_study_the_reference_tells_everything(small):
    world = World.draw(small.model_copy(update={"strata_per_study": 1, "donors_per_stratum": 1}), 2)
    predicted = ReferenceOracle(world.oracle(studies=False)).predict(
        world.samples, world.totals, *world.references()
    )
    np.testing.assert_allclose(predicted, world.omniscient, atol=2e-5)


def test_with_two_donors_a_study_the_reference_tells_what_the_study_seen_in_training_tells(small):
    """Centred, the two are opposite: whoever knows one knows both, and not which of them the sample is."""
    world = World.draw(small.model_copy(update={"strata_per_study": 1, "donors_per_stratum": 2}), 3)
    predicted = ReferenceOracle(world.oracle(studies=False)).predict(
        world.samples, world.totals, *world.references()
    )
    np.testing.assert_allclose(
        predicted, world.oracle().predict(world.samples, world.totals), atol=2e-5
    )


@pytest.mark.parametrize("missing_age", [0.0, 0.5])
def test_at_great_depth_the_oracles_are_the_conditional_mean_of_log_mu(small, missing_age):
    """Without count noise log-CPM is log mu but for the normaliser, the same for all genes: contrasts of genes are linear."""
    settings = small.model_copy(
        update={"wrong_sex": 0.0, "missing_age": missing_age, "missing_sex": 0.0}
    )
    genes = settings.genes
    quiet = {
        "dispersion": np.full(genes, 1e-7),
        "baseline": np.random.default_rng(0).uniform(-5, -4, genes),
    }
    world = World.draw(settings, 4, **quiet)
    truth, rows = world.truth, np.arange(0, 1200, 10)
    samples, totals = world.samples.iloc[rows], np.full(len(rows), 1e9)
    references = world.references(rows)
    unseen, levels = world.oracle(studies=False), truth.levels(samples)
    known = truth.known_effects(levels) + truth.perturbation_effects(levels)
    sex = (samples["sex"] == "male").to_numpy().astype(int)
    # Missing ages lean to the old, as missing_age * (1 + (age - 50) / 60) says; a stranger's are 20 to 80.
    years, age = np.arange(20, 81), samples["age_years"].to_numpy()
    missing = missing_age * (1 + (years - 50) / 60)
    strange = np.where(np.isnan(age), np.sum(missing * years) / max(missing.sum(), 1e-9), age)
    of_strangers = truth.donor_trait_effects(sex, strange)

    def contrast(values: np.ndarray) -> np.ndarray:
        return values - values.mean(axis=1, keepdims=True)

    def log_share(predicted: np.ndarray) -> np.ndarray:
        return np.log(np.expm1(predicted))  # the one added to the CPM is not in log mu

    np.testing.assert_allclose(
        contrast(log_share(unseen.predict(samples, totals))),
        contrast(known + of_strangers),
        atol=1e-3,
    )
    # The odds of the reference's stratum (1 to R - 1 beforehand): it fits or not; a stranger's disease, sex, age fit by chance.
    at = levels.study, references[1]
    fits = (truth.stratum_sex[at] == sex) & (truth.stratum_disease[at] == levels.disease)
    fits &= np.isnan(age) | (age == truth.stratum_age[at])
    same = fits * np.where(np.isnan(age), np.interp(truth.stratum_age[at], years, missing), 1.0)
    by_chance = (
        np.array([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3])[levels.disease]
        / 2
        * np.where(np.isnan(age), missing.mean(), 1 / 61)
    )
    share = same / (same + 2 * by_chance)
    assert settings.strata_per_study == 3
    traits = (
        share[:, None] * truth.donor_trait_effects(sex, truth.stratum_age[at])
        + (1 - share)[:, None] * of_strangers
    )
    predicted = ReferenceOracle(unseen).predict(samples, totals, *references)
    np.testing.assert_allclose(
        contrast(log_share(predicted)),
        contrast(known + truth.study[levels.study] + traits),
        atol=1e-3,
    )


def test_a_reference_tells_nothing_of_a_seen_study_nor_of_another_study(world):
    samples, totals = world.samples.iloc[:200], world.totals[:200]
    seen, unseen = world.oracle(), world.oracle(studies=False)
    own, elsewhere = world.references(slice(200)), world.references(slice(1000, 1200))
    assert not (samples["study"].to_numpy() == elsewhere[0]["study"].to_numpy()).any()
    np.testing.assert_array_equal(
        ReferenceOracle(seen).predict(samples, totals, *own), seen.predict(samples, totals)
    )
    np.testing.assert_array_equal(
        ReferenceOracle(unseen).predict(samples, totals, *elsewhere),
        unseen.predict(samples, totals),
    )


def test_diseases_are_as_frequent_among_strata_as_the_oracle_takes_them_to_be(small):
    disease = draw_truth(
        small.model_copy(update={"studies": 4000, "genes": 20}), np.random.default_rng(0)
    ).stratum_disease
    shares = np.bincount(disease.ravel()) / disease.size
    assert (
        np.abs(shares - hidden_factors.DISEASE_SHARES) < 4.5 * np.sqrt(shares / disease.size)
    ).all()


def test_metadata_that_cannot_come_about_are_refused(small):
    world = World.draw(small.model_copy(update={"missing_age": 0.0}), 5)
    with pytest.raises(ValueError, match="7 samples whose sex, age and disease"):
        world.oracle().predict(world.samples.iloc[:7].assign(age_years=np.nan), world.totals[:7])


# --- against simulation of what is hidden ---------------------------------------------------------------------------


def hidden_log_mu(
    truth: Truth,
    row: pd.Series,
    seen: bool,
    perturbation: bool,
    reference: tuple[int, int] | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """(DRAWS, G) log mu of one sample: hidden causes drawn by the simulator's rules, kept if recorded as the sample's were.

    `seen` and `perturbation` say whether its study and its perturbation are; `reference` is (stratum, donor) of a
    control of the same unseen study, whose effect is then known.
    """
    study, (_, strata, donors, genes) = truth.studies.index(row["study"]), truth.donor.shape
    disease, context = (
        DISEASES.index(row["disease"]),
        truth.contexts.index((row["tissue"], row["cell_type"])),
    )
    tissue = [
        name for name, _ in dict.fromkeys((tissue, None) for tissue, _ in truth.contexts)
    ].index(row["tissue"])
    proposals = 150_000
    stratum = rng.integers(0, strata, proposals)
    sex, age = rng.integers(0, 2, proposals), rng.integers(20, 81, proposals)
    of_disease = rng.choice(4, proposals, p=[0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3])
    told = np.full(proposals, seen) if reference is None else stratum == reference[0]
    sex[told], age[told] = (
        truth.stratum_sex[study, stratum[told]],
        truth.stratum_age[study, stratum[told]],
    )
    of_disease[told] = truth.stratum_disease[study, stratum[told]]
    # What would be recorded of each proposal; those recorded as this sample was are kept.
    written = np.where(rng.random(proposals) < truth.wrong_sex, 1 - sex, sex)
    written = np.where(rng.random(proposals) < truth.missing_sex, -1, written)
    hidden = rng.random(proposals) < truth.missing_age * (1 + (age - 50) / 60)
    accepted = of_disease == disease
    accepted &= written == (-1 if row["sex"] is None else SEXES.index(row["sex"]))
    accepted &= hidden if np.isnan(row["age_years"]) else ~hidden & (age == row["age_years"])
    chosen = np.flatnonzero(accepted)
    # Where few are kept (an age is one of 61), they stand for several draws, their donors drawn anew.
    assert len(chosen) > 50
    chosen = np.resize(chosen, DRAWS)
    log_mu = np.tile(
        truth.baseline + truth.context[context] + truth.disease[tissue, disease], (DRAWS, 1)
    )
    log_mu += truth.library_selection[generator.SELECTIONS.index(row["library_selection"])]
    log_mu += truth.library_layout[generator.LAYOUTS.index(row["library_layout"])]
    log_mu += truth.platform[generator.PLATFORMS.index(row["platform"])]
    log_mu += (
        np.where(sex[chosen] == 1, 0.5, -0.5)[:, None] * truth.sex
        + ((age[chosen] - 50) / 20)[:, None] * truth.age
    )
    who = rng.integers(0, donors, DRAWS)
    if seen:
        log_mu += truth.study[study] + truth.donor[study, stratum[chosen], who]
    elif reference is None:
        log_mu += (
            rng.normal(0, generator.STUDY_SCALE, (DRAWS, genes))
            + fresh_donors(donors, genes, None, None, rng)[np.arange(DRAWS), who]
        )
    else:
        same = stratum[chosen] == reference[0]
        beside = fresh_donors(
            donors, genes, reference[1], truth.donor[study, reference[0], reference[1]], rng
        )
        strange = fresh_donors(donors, genes, None, None, rng)
        log_mu += truth.study[study] + np.where(
            same[:, None], beside[np.arange(DRAWS), who], strange[np.arange(DRAWS), who]
        )
    return log_mu + hidden_perturbation(truth, row, context, perturbation, rng)


def fresh_donors(
    donors: int, genes: int, known: int | None, effect: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """(DRAWS, D, G) centred donor effects of a stratum; given the effect of a known one by Matheron's rule."""
    fresh = rng.normal(0, generator.DONOR_SCALE, (DRAWS, donors, genes))
    fresh -= fresh.mean(axis=1, keepdims=True)
    if known is None:
        return fresh
    centring = np.eye(donors) - 1 / donors
    covariance = centring @ centring.T
    factor = covariance[:, known] / covariance[known, known]
    return fresh + factor[:, None] * (effect - fresh[:, known])[:, None, :]


def hidden_perturbation(
    truth: Truth, row: pd.Series, context: int, seen: bool, rng: np.random.Generator
) -> np.ndarray:
    """(DRAWS, G) the effect of a perturbation; of an unseen one the residual and whether it acts are drawn afresh."""
    genes, index = len(truth.baseline), truth.perturbations.index(row["perturbation"])
    if index == 0:
        return np.zeros((DRAWS, genes))
    kind = str(truth.perturbation_type[index])
    strength = 1.0
    if row["perturbation_dose"] is not None:
        dose = {"100 nM": 0.1, "1 uM": 1.0, "10 uM": 10.0}[row["perturbation_dose"]]
        strength *= dose / (dose + 0.3 * np.exp(truth.embedding[index] @ truth.potency_map))
    hours = {"6 hours": 6, "24 hours": 24, "3 days": 72}[row["perturbation_time"]]
    strength *= 1 - np.exp(-hours / {"compound": 12, "crispri": 48, "overexpression": 24}[kind])
    program = np.zeros(genes)
    for mechanism in range(len(truth.mechanism)):
        loading = min(
            max(
                truth.loading_offset[mechanism]
                + truth.embedding[index] @ truth.loading_map[:, mechanism],
                0,
            ),
            1,
        )
        program += (
            strength * truth.response[context, mechanism] * loading * truth.mechanism[mechanism]
        )
    if kind != "compound":
        program[truth.target[index]] += {"crispri": -1, "overexpression": 1}[kind] * np.log(
            generator.DIRECT_FOLD
        )
    if seen:
        active, residual = np.full((DRAWS, 1), truth.active[index]), truth.residual[index]
    else:
        active = (rng.random((DRAWS, 1)) >= truth.null_share).astype(float)
        folds = rng.choice([-1, 1], (DRAWS, genes)) * rng.uniform(
            *np.log(generator.RESIDUAL_FOLD), (DRAWS, genes)
        )
        residual = folds * (rng.random((DRAWS, genes)) < generator.RESIDUAL_SHARE)
    return active * (program + strength * truth.response[context, -1] * residual)


def simulated_error(
    world: World,
    rows: np.ndarray,
    predicted: np.ndarray,
    simulated: list[np.ndarray],
    rng: np.random.Generator,
) -> float:
    """Mean squared difference of predictions and the mean of simulations (log mu (DRAWS, G) of each row), their noise subtracted."""
    mean, variance = [], []
    for row, log_mu in zip(rows, simulated, strict=True):
        fraction = np.exp(log_mu)
        fraction /= fraction.sum(axis=1, keepdims=True)
        expected = fraction * world.totals[row]
        counts = rng.negative_binomial(
            1 / world.truth.dispersion, 1 / (1 + world.truth.dispersion * expected)
        )
        expression = np.log1p(1e6 * counts / counts.sum(axis=1, keepdims=True))
        mean.append(expression.mean(axis=0))
        variance.append(expression.var(axis=0) / (DRAWS - 1))
    # No gene is off by more than its Monte-Carlo error and the approximations allow.
    assert (np.abs(predicted - mean) < 5 * np.sqrt(variance) + 0.03).all()
    return float(np.mean((predicted - mean) ** 2 - variance))


def test_the_normaliser_is_the_mean_log_sum_also_where_a_gene_dominates(rng):
    log_mu, blur = np.log(np.array([[0.5, 0.3, *[0.01] * 20], [0.05] * 20 + [0.0001] * 2])), 0.25
    noise = rng.normal(0, blur, (100_000, 22))
    simulated = [np.log(np.exp(row + noise).sum(axis=1)).mean() for row in log_mu]
    np.testing.assert_allclose(_normaliser(log_mu, blur), simulated, atol=1e-3)


def test_drawn_effects_of_unseen_perturbations_have_the_moments_that_the_prediction_integrates(
    world,
):
    row = np.flatnonzero(world.samples["perturbation"].str.startswith("crispri"))[0]
    levels = world.truth.levels(world.samples.iloc[np.full(5000, row)])
    scale, program = world.truth.residual_scale(levels)[0], world.truth.predictable_program(levels)
    drawn = hidden_factors.draw_outcomes(world.truth, levels, False, np.random.default_rng(6))
    still = (drawn == 0).all(axis=1)
    assert still.mean() == pytest.approx(float(world.truth.null_share), abs=0.02)
    nodes, weights = hidden_factors._residual_nodes()
    peculiar = (drawn - program)[~still]
    assert scale > 0
    assert (peculiar != 0).mean() == pytest.approx(generator.RESIDUAL_SHARE, rel=0.05)
    assert (peculiar**2).mean() == pytest.approx(scale**2 * weights @ nodes**2, rel=0.07)
    assert np.exp(peculiar).mean() == pytest.approx(weights @ np.exp(scale * nodes), rel=0.003)


def rows_of_kind(world: World, kind: str) -> np.ndarray:
    sex, age = world.samples["sex"].isna(), world.samples["age_years"].isna()
    treated = world.samples["perturbation"] != "control"
    chosen = {"recorded": ~sex & ~age, "missing": sex & age, "no age": ~sex & age}.get(
        kind, treated
    )
    rows = np.flatnonzero(chosen)
    return rows[np.linspace(0, len(rows) - 1, QUERIES).astype(int)]


@pytest.fixture(scope="module")
def gap_to_ridge(world, params) -> float:
    """What the metadata oracle is used for: how much better than ridge it is on samples at random, in mean squared error."""
    train = np.random.default_rng(0).random(len(world.samples)) < 0.8
    encoder = MetadataEncoder.fit(world.samples[train], params.data.covariates)
    ridge = Ridge.fit(
        encoder,
        world.samples[train],
        world.expression[train],
        (world.samples[~train], world.expression[~train]),
    )
    errors = [
        ((predicted - world.expression[~train]) ** 2).mean()
        for predicted in (ridge.predict(world.samples[~train]), oracle_on(world, ~train))
    ]
    return float(errors[0] - errors[1])


def oracle_on(world: World, chosen: np.ndarray) -> np.ndarray:
    return world.oracle().predict(world.samples[chosen], world.totals[chosen])


@pytest.fixture(scope="module")
def gap_of_reference(world) -> float:
    """What the reference oracle is used for: the way from the metadata oracle to the omniscient one in a new study."""
    metadata = world.oracle(studies=False).predict(world.samples, world.totals)
    return float(
        np.mean((metadata - world.expression) ** 2)
        - np.mean((world.omniscient - world.expression) ** 2)
    )


@pytest.mark.parametrize(
    "kind", ["recorded", "missing", "no age", "unseen study", "unseen perturbation", "both unseen"]
)
def test_the_metadata_oracle_agrees_with_simulation_to_below_one_percent_of_its_gap_to_ridge(
    world, gap_to_ridge, kind
):
    """The approximations (normalisers of what is unseen, total counts as if they were the library size) are in the difference."""
    rng, rows = np.random.default_rng(12), rows_of_kind(world, kind)
    seen = {
        "studies": kind not in ("unseen study", "no age", "both unseen"),
        "perturbations": kind not in ("unseen perturbation", "both unseen"),
    }
    predicted = world.oracle(**seen).predict(world.samples.iloc[rows], world.totals[rows])
    simulated = [
        hidden_log_mu(world.truth, world.samples.iloc[row], *seen.values(), None, rng)
        for row in rows
    ]
    error = simulated_error(world, rows, predicted, simulated, rng)
    print(
        f"metadata oracle, {kind}: off by {error:.2e} log-CPM squared, {error / gap_to_ridge:.3%} of its gap to ridge"
    )
    assert error < 0.01 * gap_to_ridge


@pytest.mark.parametrize("kind", ["recorded", "missing", "no age", "unseen perturbation"])
def test_the_reference_oracle_agrees_with_simulation_to_below_one_percent_of_the_gap_it_closes(
    world, gap_of_reference, kind
):
    rng, rows, seen = (
        np.random.default_rng(13),
        rows_of_kind(world, kind),
        kind != "unseen perturbation",
    )
    references = world.references(rows)
    predicted = ReferenceOracle(world.oracle(False, seen)).predict(
        world.samples.iloc[rows], world.totals[rows], *references
    )
    simulated = [
        hidden_log_mu(world.truth, world.samples.iloc[row], False, seen, (stratum, donor), rng)
        for row, stratum, donor in zip(rows, *references[1:], strict=True)
    ]
    error = simulated_error(world, rows, predicted, simulated, rng)
    print(
        f"reference oracle, {kind}: off by {error:.2e} log-CPM squared, {error / gap_of_reference:.3%} of the gap to the omniscient"
    )
    assert error < 0.01 * gap_of_reference


def test_the_error_of_the_omniscient_oracle_is_nothing_beside_the_gap(world, gap_of_reference):
    """Against fresh simulations of the same samples, the noise of their mean subtracted."""
    rows, draws, rng = np.arange(0, 1200, 20), 100, np.random.default_rng(0)
    predicted = OmniscientOracle(Tables(world.truth)).predict(
        world.log_fraction[rows], world.totals[rows]
    )
    simulated = []
    for _ in range(draws):
        counts = draw_counts(
            world.log_fraction[rows], world.totals[rows], world.truth.dispersion, rng
        )
        simulated.append(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e6))
    error = np.mean(
        (np.mean(simulated, axis=0) - predicted) ** 2 - np.var(simulated, axis=0, ddof=1) / draws
    )
    assert abs(error) < 0.01 * gap_of_reference


# --- order of the predictors ----------------------------------------------------------------------------------------


def assert_not_worse(
    first: np.ndarray, second: np.ndarray, observed: np.ndarray, studies: pd.Series
) -> None:
    """Paired difference of squared errors, by study (what its samples share makes their errors alike)."""
    difference = ((second - observed) ** 2 - (first - observed) ** 2).mean(axis=1)
    by_study = pd.Series(difference).groupby(studies.to_numpy()).mean()
    slack = 2 * by_study.sem() if len(by_study) > 2 else 0.0
    assert by_study.mean() >= -slack


def test_the_more_an_oracle_knows_the_less_it_errs(world):
    samples, totals, observed = world.samples, world.totals, world.expression
    unseen = world.oracle(studies=False)
    mean = np.broadcast_to(observed.mean(axis=0), observed.shape)
    reference = ReferenceOracle(unseen).predict(samples, totals, *world.references())
    ladder = [
        world.omniscient,
        world.oracle().predict(samples, totals),
        reference,
        unseen.predict(samples, totals),
        mean,
    ]
    errors = [np.mean((predicted - observed) ** 2) for predicted in ladder]
    assert errors == sorted(errors)
    for better, worse in pairwise(ladder):
        assert_not_worse(better, worse, observed, samples["study"])


def test_no_fitted_predictor_beats_the_oracles_on_the_tiny_cohort(cohort):
    truth, train = Truth.load(cohort.truth_folder), cohort.rows(["train"])
    kept, expression = (
        pd.Index(truth.gene_id).get_indexer(cohort.genes),
        cohort.expression(["train"]),
    )
    hidden = pd.read_parquet(cohort.truth_folder / "samples.parquet").set_index("sample_id")[
        ["stratum", "donor"]
    ]
    metadata = MetadataOracle(truth, set(train["study"]), set(train["perturbation"]))
    ridge = Ridge.fit(
        MetadataEncoder.fit(train, cohort.declared.covariates), train, expression, None
    )
    additive = Additive(cohort.declared, train, expression)
    for split in ("test_random", "test_combination", "test_perturbation", "test_study"):
        samples, observed, totals = (
            cohort.rows([split]),
            cohort.expression([split]),
            cohort.rows([split])["total"].to_numpy(),
        )
        own = samples[is_control(samples, cohort.declared).to_numpy()]
        pool = pd.concat([train, own]) if split == "test_study" else train
        reference = pool.iloc[choose_references(samples, pool, cohort.declared, 0)]
        causes_of = [hidden.loc[rows["sample_id"]].to_numpy().T for rows in (samples, reference)]
        ladder = [
            OmniscientOracle(metadata.tables).predict(
                log_fractions(truth, samples, *causes_of[0]), totals
            )[:, kept],
            ReferenceOracle(metadata).predict(samples, totals, reference, *causes_of[1])[:, kept],
            metadata.predict(samples, totals)[:, kept],
        ]
        for better, worse in pairwise(ladder):
            assert_not_worse(better, worse, observed, samples["study"])
        for fitted in (
            ridge.predict(samples),
            additive.predict(samples),
            training_mean(expression, len(samples)),
        ):
            assert_not_worse(ladder[2], fitted, observed, samples["study"])
        if split == "test_random":
            assert np.mean((ladder[2] - observed) ** 2) < np.mean(
                (ridge.predict(samples) - observed) ** 2
            )


def test_the_oracle_is_not_beaten_by_any_that_knows_the_true_effects_and_less_of_the_sample(world):
    samples, totals = world.samples, world.totals
    oracle = world.oracle()
    predicted = oracle.predict(samples, totals)
    rivals = {
        "without recorded sex": oracle.predict(samples.assign(sex=None), totals),
        "without recorded age": oracle.predict(samples.assign(age_years=np.nan), totals),
        "without the study": world.oracle(studies=False).predict(samples, totals),
        "without the perturbation": world.oracle(perturbations=False).predict(samples, totals),
        "everything is a control": oracle.predict(samples.assign(perturbation="control"), totals),
    }
    for rival in rivals.values():
        assert_not_worse(predicted, rival, world.expression, samples["study"])
    for name in ("without the study", "without the perturbation", "everything is a control"):
        assert np.mean((rivals[name] - world.expression) ** 2) > np.mean(
            (predicted - world.expression) ** 2
        ), name


def test_knowing_the_perturbations_map_is_better_than_taking_unseen_ones_for_controls(world):
    treated = (world.samples["perturbation"] != "control").to_numpy()
    samples, totals, observed = (
        world.samples[treated],
        world.totals[treated],
        world.expression[treated],
    )
    unseen = world.oracle(perturbations=False)
    errors = [
        np.mean((unseen.predict(table, totals) - observed) ** 2)
        for table in (samples, samples.assign(perturbation="control"))
    ]
    assert errors[0] < errors[1]


def test_the_oracles_predict_row_by_row(world):
    """Neither the order nor the company of the rows matters, though rows are handled in blocks and kinds together."""
    oracle = ReferenceOracle(
        MetadataOracle(
            world.truth, set(world.truth.studies[:6]), set(world.truth.perturbations[:7])
        )
    )
    references = world.references()
    whole = oracle.predict(world.samples, world.totals, *references)
    assert np.isfinite(whole).all()
    rows = np.random.default_rng(0).permutation(len(whole))[:40]
    some = oracle.predict(
        world.samples.iloc[rows],
        world.totals[rows],
        references[0].iloc[rows],
        *(part[rows] for part in references[1:]),
    )
    np.testing.assert_allclose(some, whole[rows], atol=1e-5)


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "recorded",
        "missing",
        "unseen study",
        "unseen perturbation",
        "reference",
        "reference and unseen perturbation",
    ],
)
def test_the_mean_of_many_draws_is_the_prediction(world, gap_of_reference, kind):
    rows = rows_of_kind(world, "missing" if kind == "missing" else "treated")
    often, rng = np.repeat(rows, DRAWS), np.random.default_rng(3)
    samples, totals = world.samples.iloc[often], world.totals[often]
    metadata = world.oracle(
        studies=kind in ("recorded", "missing", "unseen perturbation"),
        perturbations="unseen perturbation" not in kind,
    )
    if kind.startswith("reference"):
        table, stratum, donor = world.references(rows)
        predicted = ReferenceOracle(metadata).predict(
            world.samples.iloc[rows], world.totals[rows], table, stratum, donor
        )
        each = np.repeat(np.arange(QUERIES), DRAWS)
        counts = ReferenceOracle(metadata).draw(
            samples, totals, table.iloc[each], stratum[each], donor[each], rng
        )
    else:
        predicted = metadata.predict(world.samples.iloc[rows], world.totals[rows])
        counts = metadata.draw(samples, totals, rng)
    assert np.issubdtype(counts.dtype, np.integer)
    expression = np.log1p(1e6 * counts / totals[:, None]).reshape(QUERIES, DRAWS, -1)
    variance = expression.var(axis=1) / (DRAWS - 1)
    difference = expression.mean(axis=1) - predicted
    assert (np.abs(difference) < 5 * np.sqrt(variance) + 0.01).all()
    assert np.mean(difference**2 - variance) < 0.01 * gap_of_reference
    np.testing.assert_allclose(
        counts.sum(axis=1).reshape(QUERIES, DRAWS).mean(axis=1), world.totals[rows], rtol=0.02
    )


@pytest.fixture(scope="module")
def crowd(small) -> World:
    """Many studies of few samples: hidden effects are drawn often."""
    return World.draw(
        small.model_copy(
            update={"genes": 50, "samples": 1600, "studies": 200, "perturbations": 40}
        ),
        9,
    )


@pytest.mark.parametrize(
    "oracle", ["omniscient", "metadata", "unseen studies", "unseen perturbations", "reference"]
)
def test_the_rank_of_an_observation_among_draws_is_uniform(crowd, oracle):
    """The probability integral transform: what was observed is one more draw. At equal library sizes, which are known here."""
    samples, sizes, rng = crowd.samples, crowd.design.library_size, np.random.default_rng(4)
    unseen = crowd.oracle(studies=False)
    draw = {
        "omniscient": lambda: OmniscientOracle(Tables(crowd.truth)).draw(
            crowd.log_fraction, sizes, rng
        ),
        "metadata": lambda: crowd.oracle().draw(samples, sizes, rng),
        "unseen studies": lambda: unseen.draw(samples, sizes, rng),
        "unseen perturbations": lambda: crowd.oracle(perturbations=False).draw(samples, sizes, rng),
        "reference": lambda: ReferenceOracle(unseen).draw(samples, sizes, *crowd.references(), rng),
    }[oracle]
    rank, others = np.zeros(crowd.counts.shape), 9
    for _ in range(others):
        counts = draw()
        rank += counts + 1e-6 * rng.random(counts.shape) < crowd.counts + 1e-6 * rng.random(
            counts.shape
        )
    shares = np.bincount(rank.astype(int).ravel(), minlength=others + 1) / rank.size
    assert np.abs(shares - 1 / (others + 1)).max() < 0.006, shares


def test_draws_follow_their_generator(world):
    samples, totals = world.samples.iloc[:50], world.totals[:50]
    first, again, other = (
        world.oracle().draw(samples, totals, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# --- true effects ---------------------------------------------------------------------------------------------------


def untreated(samples: pd.DataFrame) -> pd.DataFrame:
    return samples.assign(
        perturbation="control",
        perturbation_type="control",
        perturbation_dose=None,
        perturbation_time=None,
    )


def test_the_true_effect_is_the_difference_of_log_fractions_treated_and_untreated(world):
    same = replace(
        world.truth, donor=0 * world.truth.donor, sex=0 * world.truth.sex, age=0 * world.truth.age
    )
    causes_of = world.design.stratum, world.design.donor
    expected = log_fractions(same, world.samples, *causes_of) - log_fractions(
        same, untreated(world.samples), *causes_of
    )
    np.testing.assert_allclose(true_effects(world.truth, world.samples), expected, atol=1e-9)


def test_the_donor_hardly_moves_the_true_effect(world):
    causes_of = world.design.stratum, world.design.donor
    exact = world.log_fraction - log_fractions(world.truth, untreated(world.samples), *causes_of)
    difference = true_effects(world.truth, world.samples) - exact
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(exact**2))
    assert (
        np.mean((np.abs(exact) >= np.log(1.2)) != truly_changed(world.truth, world.samples)) < 0.01
    )


def test_controls_and_perturbations_without_effect_change_no_gene(world):
    levels = world.truth.levels(world.samples)
    still = world.truth.active[levels.perturbation] == 0
    assert still.any() and not still.all()
    effects = true_effects(world.truth, world.samples)
    np.testing.assert_array_equal(effects[still], 0)
    assert np.abs(effects[~still]).max(axis=1).min() > 0
    changed = truly_changed(world.truth, world.samples, fold=2.0)
    np.testing.assert_array_equal(changed, (np.exp(effects) >= 2) | (np.exp(effects) <= 0.5))
