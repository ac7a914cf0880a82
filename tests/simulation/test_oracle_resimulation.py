"""Oracles against simulation of the hidden factors, one sample at a time.

The errors include the approximations: normalisers of unknown effects, total counts in place of
library sizes.
"""

import numpy as np
import pytest
from support.resimulation import DRAWS, KINDS, SimulatedCohort, simulate_log_mu

from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.evaluation.baselines.ridge import (
    Design,
    NormalEquations,
    Ridge,
    best_penalty,
)
from pipeline.gem.simulation.generator import RESIDUAL, draw_counts
from pipeline.gem.simulation.oracle import (
    MetadataOracle,
    ReferenceControls,
    expected_log_sum_exp,
)
from pipeline.gem.simulation.perturbation_outcomes import (
    KnownPerturbations,
    draw_perturbation_effects,
    perturbation_outcomes,
)

QUERIES = 4  # samples of each kind


@pytest.fixture(scope="session", params=list(KINDS))
def simulated(request, small) -> SimulatedCohort:
    return SimulatedCohort.draw(small.model_copy(update=KINDS[request.param]), 8)


def rows_of_kind(simulated: SimulatedCohort, kind: str) -> np.ndarray:
    """QUERIES rows by the recorded sex and age; treated ones for other kinds."""
    no_sex, no_age = simulated.samples["sex"].isna(), simulated.samples["age_years"].isna()
    kinds = {"recorded": ~no_sex & ~no_age, "missing": no_sex & no_age, "no age": ~no_sex & no_age}
    rows = np.flatnonzero(kinds.get(kind, simulated.samples["perturbation"] != "control"))
    return rows[np.linspace(0, len(rows) - 1, QUERIES).astype(int)]


def simulated_error(
    simulated: SimulatedCohort,
    rows: np.ndarray,
    predicted: np.ndarray,
    log_mus: list[np.ndarray],
    rng: np.random.Generator,
) -> float:
    """Mean squared difference of predictions and means of simulated counts, without their noise.

    `log_mus` holds the simulated log mu (DRAWS, G) of each row.
    """
    mean, variance = [], []
    dispersion = simulated.truth.dispersion
    for row, log_mu in zip(rows, log_mus, strict=True):
        fraction = np.exp(log_mu)
        fraction /= fraction.sum(axis=1, keepdims=True)
        expected = fraction * simulated.totals[row]
        counts = rng.negative_binomial(1 / dispersion, 1 / (1 + dispersion * expected))
        expression = np.log1p(1e6 * counts / counts.sum(axis=1, keepdims=True))
        mean.append(expression.mean(axis=0))
        variance.append(expression.var(axis=0) / (DRAWS - 1))
    # The difference of each gene is within its Monte-Carlo error and the approximations.
    assert (np.abs(predicted - mean) < 5 * np.sqrt(variance) + 0.03).all()
    return float(np.mean((predicted - mean) ** 2 - variance))


@pytest.fixture(scope="module")
def ridge_gap(simulated, params) -> float:
    """Mean squared error of ridge on random samples, minus that of the metadata oracle."""
    train = np.random.default_rng(0).random(len(simulated.samples)) < 0.8
    samples, expression = simulated.samples, simulated.expression
    encoder = MetadataEncoder.fit(samples[train], params.data.covariates)
    design = Design(encoder, samples[train])
    equations = NormalEquations.of(design.rows, design.columns, [expression[train]])
    penalty = best_penalty(encoder, equations, samples[~train], expression[~train])
    ridge = Ridge.fit(encoder, equations, penalty)
    oracle = simulated.oracle().predict(samples[~train], simulated.totals[~train])
    errors = [
        ((predicted - expression[~train]) ** 2).mean()
        for predicted in (ridge.predict(samples[~train]), oracle)
    ]
    return float(errors[0] - errors[1])


@pytest.mark.parametrize(
    "kind", ["recorded", "missing", "no age", "unknown study", "unknown perturbation", "both"]
)
def test_error_of_the_metadata_oracle_is_below_one_percent_of_its_gap_to_ridge(
    simulated, ridge_gap, kind
):
    rng, rows = np.random.default_rng(12), rows_of_kind(simulated, kind)
    studies = kind not in ("unknown study", "no age", "both")
    perturbations = kind not in ("unknown perturbation", "both")
    oracle = simulated.oracle(studies, perturbations)
    predicted = oracle.predict(simulated.samples.iloc[rows], simulated.totals[rows])
    log_mus = [
        simulate_log_mu(
            simulated.truth, simulated.samples.iloc[row], studies, perturbations, None, rng
        )
        for row in rows
    ]
    error = simulated_error(simulated, rows, predicted, log_mus, rng)
    print(f"metadata oracle, {kind}: error {error:.2e} log-CPM^2, {error / ridge_gap:.3%} of gap")
    assert error < 0.01 * ridge_gap


@pytest.mark.parametrize("kind", ["recorded", "missing", "no age", "unknown perturbation"])
def test_error_of_the_reference_oracle_is_below_one_percent_of_the_gap_that_it_closes(
    simulated, reference_gap, kind
):
    rng, rows = np.random.default_rng(13), rows_of_kind(simulated, kind)
    perturbations = kind != "unknown perturbation"
    references = simulated.references(rows)
    oracle = simulated.oracle(False, perturbations)
    predicted = oracle.predict(simulated.samples.iloc[rows], simulated.totals[rows], references)
    log_mus = [
        simulate_log_mu(
            simulated.truth, simulated.samples.iloc[row], False, perturbations, reference, rng
        )
        for row, *reference in zip(rows, references.stratum, references.donor, strict=True)
    ]
    error = simulated_error(simulated, rows, predicted, log_mus, rng)
    share = error / reference_gap
    print(f"reference oracle, {kind}: error {error:.2e} log-CPM^2, {share:.3%} of gap")
    assert error < 0.01 * reference_gap


def test_error_of_the_omniscient_oracle_is_below_one_percent_of_the_gap(simulated, reference_gap):
    rows, draws, rng = np.arange(0, 1200, 20), 100, np.random.default_rng(0)
    log_fraction, totals = simulated.log_fraction[rows], simulated.totals[rows]
    predicted = simulated.omniscient_oracle.predict(log_fraction, totals)
    expression = []
    for _ in range(draws):
        counts = draw_counts(log_fraction, totals, simulated.truth.dispersion, rng)
        expression.append(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e6))
    noise = np.var(expression, axis=0, ddof=1) / draws
    error = np.mean((np.mean(expression, axis=0) - predicted) ** 2 - noise)
    assert abs(error) < 0.01 * reference_gap


def test_expected_log_sum_exp_agrees_with_simulation_also_for_a_dominant_gene(rng):
    log_mu = np.log(np.array([[0.5, 0.3, *[0.01] * 20], [0.05] * 20 + [0.0001] * 2]))
    noise = rng.normal(0, 0.25, (100_000, 22))
    simulated = [np.log(np.exp(row + noise).sum(axis=1)).mean() for row in log_mu]
    np.testing.assert_allclose(expected_log_sum_exp(log_mu, 0.25), simulated, atol=1e-3)


def test_drawn_effects_of_unknown_perturbations_have_the_moments_of_the_quadrature(small):
    simulated = SimulatedCohort.draw(small, 8)
    truth = simulated.truth
    row = np.flatnonzero(simulated.samples["perturbation"].str.startswith("crispri"))[0]
    levels = truth.levels(simulated.samples.iloc[np.full(5000, row)])
    scale = truth.residual_scale(levels)[0]
    program = truth.predictable_response(levels, [np.ones(5000)])
    kind = int(KnownPerturbations.of(truth, set(), None).kinds(levels)[0])
    drawn = draw_perturbation_effects(truth, levels, kind, np.random.default_rng(6))
    inactive = (drawn == 0).all(axis=1)
    assert inactive.mean() == pytest.approx(float(truth.null_share), abs=0.02)
    nodes, weights = RESIDUAL.quadrature()
    residual = (drawn - program)[~inactive]
    assert scale > 0
    assert (residual != 0).mean() == pytest.approx(RESIDUAL.share, rel=0.05)
    assert (residual**2).mean() == pytest.approx(scale**2 * weights @ nodes**2, rel=0.07)
    assert np.exp(residual).mean() == pytest.approx(weights @ np.exp(scale * nodes), rel=0.003)


@pytest.mark.parametrize("number", [1, 2])
def test_the_quadrature_of_unknown_effects_has_their_variance(small, number):
    """Of one perturbation outside training or of two, each with a program in its context: the
    nodes that are left out hardly count."""
    settings = small.model_copy(update=KINDS["every_option"])
    simulated = SimulatedCohort.draw(settings, 8)
    truth, names = simulated.truth, simulated.samples["perturbation"]
    size = names.str.count("[|]") + 1
    rows = np.flatnonzero((names != "control") & (size == number))[:20]
    levels = truth.levels(simulated.samples.iloc[rows])
    (kind,) = np.unique(KnownPerturbations.of(truth, set(), None).kinds(levels))
    outcome = perturbation_outcomes(truth, levels, int(kind))[-1]  # all are active
    weights = np.array([weight for weight, _ in outcome.nodes])
    assert weights.sum() == pytest.approx((1 - truth.null_share) ** number)
    found = sum(weight * unknown[:, 0] ** 2 for weight, unknown in outcome.nodes) / weights.sum()
    factor = np.ones(len(rows))
    if number == 2:
        factor = truth.interaction(levels, [np.ones(len(rows))] * 2)
    expected, square = 0.0, lambda effects: effects.quadrature()[1] @ effects.quadrature()[0] ** 2
    for member in levels.members:
        expected = expected + (factor * truth.residual_scale(member)) ** 2 * square(RESIDUAL)
        expected = expected + (factor * truth.context_scale(member)) ** 2  # of unit variance
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_the_oracle_integrates_over_the_program_of_a_pair_outside_training(every_option):
    """The perturbation is known from other contexts. Against simulation of what is not known."""
    truth, samples = every_option.truth, every_option.samples
    treated = np.flatnonzero(truth.active[truth.perturbations_in(samples)[:, 0]] == 1)
    rows = treated[np.linspace(0, len(treated) - 1, QUERIES).astype(int)]
    contexts = truth.context_index(samples)
    training = samples[~np.isin(contexts, contexts[rows])]
    names = set(truth.perturbations)
    oracle = MetadataOracle(truth, set(truth.studies), names, training)
    totals, rng = every_option.totals, np.random.default_rng(14)
    predicted = oracle.predict(samples.iloc[rows], totals[rows])
    log_mus = [
        simulate_log_mu(truth, samples.iloc[row], True, True, None, rng, pair_known=False)
        for row in rows
    ]
    error = simulated_error(every_option, rows, predicted, log_mus, rng)
    known = every_option.oracle().predict(samples.iloc[rows], totals[rows])
    assert error < 0.01 * np.mean((known - predicted) ** 2)
    others = np.flatnonzero(~np.isin(contexts, contexts[rows]))[:100]
    np.testing.assert_allclose(
        oracle.predict(samples.iloc[others], totals[others]),
        every_option.oracle().predict(samples.iloc[others], totals[others]),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("kind", "studies", "perturbations", "use_reference"),
    [
        ("recorded", True, True, False),
        ("missing", True, True, False),
        ("unknown study", False, True, False),
        ("unknown perturbation", True, False, False),
        ("reference", False, True, True),
        ("reference and unknown perturbation", False, False, True),
    ],
)
def test_mean_of_many_draws_is_the_prediction(
    simulated, reference_gap, kind, studies, perturbations, use_reference
):
    rows = rows_of_kind(simulated, "missing" if kind == "missing" else "treated")
    repeated, rng = np.repeat(rows, DRAWS), np.random.default_rng(3)
    references = repeated_references = None
    if use_reference:
        references, each = simulated.references(rows), np.repeat(np.arange(QUERIES), DRAWS)
        repeated_references = ReferenceControls(
            references.samples.iloc[each], references.stratum[each], references.donor[each]
        )
    samples, totals = simulated.samples, simulated.totals
    oracle = simulated.oracle(studies, perturbations)
    predicted = oracle.predict(samples.iloc[rows], totals[rows], references)
    counts = oracle.draw(samples.iloc[repeated], totals[repeated], repeated_references, rng=rng)
    assert np.issubdtype(counts.dtype, np.integer)
    expression = np.log1p(1e6 * counts / totals[repeated][:, None]).reshape(QUERIES, DRAWS, -1)
    variance = expression.var(axis=1) / (DRAWS - 1)
    difference = expression.mean(axis=1) - predicted
    assert (np.abs(difference) < 5 * np.sqrt(variance) + 0.01).all()
    assert np.mean(difference**2 - variance) < 0.01 * reference_gap
    mean_totals = counts.sum(axis=1).reshape(QUERIES, DRAWS).mean(axis=1)
    np.testing.assert_allclose(mean_totals, totals[rows], rtol=0.02)
