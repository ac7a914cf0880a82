"""The mixed model against its dual form with dense kernels, and against refits without a row."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.gem.common.config import Control, Covariates
from pipeline.gem.data.encoder import MetadataEncoder, joined_rows
from pipeline.gem.model.mixed import fit, terms
from pipeline.gem.model.mixed.fit import MixedFit, MixedSamples
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.mixed.terms import LENGTH_SCALES, Design, Factor

GENES = 30
COVARIATES = {
    "technical": {"batch": {"kind": "categorical"}},
    "biological": {"donor": {"kind": "categorical"}},
    "perturbation": {
        "drug": {"kind": "categorical"},
        "hours": {"kind": "numeric", "scale": "log"},
    },
}


@pytest.fixture
def declared(dosed):
    return dosed.model_copy(
        update={
            "covariates": Covariates.model_validate(COVARIATES),
            "context_columns": ("donor",),
            "control": Control(column="drug", value="none"),
        }
    )


@pytest.fixture
def table(rng) -> pd.DataFrame:
    """60 samples of four donors, three drugs and a control, three times."""
    return pd.DataFrame(
        {
            "batch": rng.choice(["x", "y"], 60),
            "donor": rng.choice(list("abcd"), 60),
            "drug": rng.choice(["none", "p", "q", "r"], 60),
            "hours": rng.choice(["3", "6", "24"], 60),
        }
    )


@pytest.fixture
def expression(table, rng) -> np.ndarray:
    """Effects of donors and drugs, and of drugs that grow with time."""
    levels = {
        name: dict(zip(sorted(table[name].unique()), rng.normal(0, 1, (9, GENES)), strict=False))
        for name in ("donor", "drug")
    }
    effects = sum(np.stack([levels[name][value] for value in table[name]]) for name in levels)
    growth = np.log(table["hours"].astype(float).to_numpy())[:, None]
    of_drug = np.stack([levels["drug"][value] for value in table["drug"]])
    return 5 + effects + 0.4 * growth * of_drug + rng.normal(0, 0.3, (len(table), GENES))


def samples_of(encoder, table, expression, size: int = 17) -> MixedSamples:
    def blocks():
        for start in range(0, len(table), size):
            values = torch.from_numpy(expression[start : start + size]).float()
            yield np.arange(start, start + len(values)), values

    rows, index = joined_rows(encoder.encode(table, unknown="missing"))
    numbers = np.bincount(index, minlength=rows.shape[0])
    return MixedSamples(rows, index, blocks, numbers, np.ones(GENES), np.zeros(GENES))


@pytest.fixture
def encoder(declared, table) -> MetadataEncoder:
    return MetadataEncoder.fit(table, declared.covariates)


@pytest.fixture
def variances(encoder, declared, table, expression) -> MixedFit:
    return MixedFit.of(encoder, declared, samples_of(encoder, table, expression), GENES)


@pytest.fixture
def mixed(variances, encoder, table, expression) -> MixedModel:
    return variances.model(encoder, samples_of(encoder, table, expression))


def fitted(encoder, declared, samples: MixedSamples) -> MixedModel:
    return MixedFit.of(encoder, declared, samples, GENES).model(encoder, samples)


def predictions(mixed: MixedModel, encoder, table) -> np.ndarray:
    rows, index = joined_rows(encoder.encode(table, unknown="missing"))
    return mixed.predict(mixed.rows(encoder, rows)).numpy()[index]


def kernel(mixed: MixedModel, left: pd.DataFrame, right: pd.DataFrame) -> np.ndarray:
    """(left, right) prior covariance of the predictions, written from the definition of the terms.

    Training has every number of hours, so that the smooth kernel is exact there.
    """
    hours = ["3", "6", "24"]
    place = np.arange(3.0) - 1
    place /= place.std()

    def factor(one: Factor) -> np.ndarray:
        if one.kind == "smooth":
            spots = [place[[hours.index(h) for h in t["hours"]]] for t in (left, right)]
            squares = (spots[0][:, None] - spots[1]) ** 2
            return np.mean([np.exp(-squares / 2 / scale**2) for scale in LENGTH_SCALES], axis=0)
        values = [t[one.covariate].to_numpy() for t in (left, right)]
        if one.kind == "similarity":
            donors = [["abcd".index(name) for name in names] for names in values]
            features = np.array(mixed.design.contexts.features)
            return (features @ features.T)[np.ix_(*donors)]
        treated = (values[0] != "none")[:, None] & (values[1] != "none")
        same = values[0][:, None] == values[1]
        return {"levels": same, "treatment": same & treated, "treated": treated}[one.kind]

    total = np.zeros((len(left), len(right)))
    for term, variance in zip(mixed.design.terms, mixed.variances[0].terms, strict=True):
        total += variance * np.prod([factor(one) for one in term.factors], axis=0)
    return total


def best_linear_unbiased(mixed, train, expression, query) -> np.ndarray:
    """mu + K V^-1 (y - mu), with the generalised least squares mean."""
    same = (train.to_numpy()[:, None] == train.to_numpy()).all(axis=2)
    (variances,) = mixed.variances
    noise = variances.row * same + variances.noise * np.eye(len(train))
    inverse = np.linalg.inv(kernel(mixed, train, train) + noise)
    mean = inverse.sum(axis=0) @ expression / inverse.sum()
    return mean + kernel(mixed, query, train) @ inverse @ (expression - mean)


def test_predictions_are_the_best_linear_unbiased_ones(mixed, encoder, table, expression):
    product = pd.MultiIndex.from_product([list("xy"), list("abcd"), ["none", "p", "q", "r"]])
    query = product.to_frame(index=False, name=["batch", "donor", "drug"]).assign(hours="6")
    assert {"donor", "drug", "drug x smooth hours"} <= {t.name for t in mixed.design.terms}
    expected = best_linear_unbiased(mixed, table, expression, query)
    np.testing.assert_allclose(predictions(mixed, encoder, query), expected, atol=2e-3)


def test_held_out_pairs_are_predicted_better_than_by_any_single_penalty(
    encoder, declared, table, expression
):
    """The variances pay: batches have no effect, donors and drugs a large one."""
    pairs = table["donor"] + table["drug"]
    held_out = pairs.isin(["ap", "bq", "cr"]).to_numpy()
    assert held_out.sum() >= 5
    train = table[~held_out].reset_index(drop=True)
    samples = samples_of(encoder, train, expression[~held_out])
    mixed = fitted(encoder, declared, samples)
    observed = expression[held_out]
    error = ((predictions(mixed, encoder, table[held_out]) - observed) ** 2).mean()
    encoded = encoder.encode(table)
    design = np.concatenate([encoded[group].matrix().toarray() for group in encoded], axis=1)
    centre, mean = design[~held_out].mean(axis=0), expression[~held_out].mean(axis=0)
    inner = (design[~held_out] - centre).T @ (design[~held_out] - centre)
    right = (design[~held_out] - centre).T @ (expression[~held_out] - mean)
    for penalty in 10.0 ** np.arange(-2, 3):
        coefficients = np.linalg.solve(inner + penalty * np.eye(len(inner)), right)
        ridge = mean + (design[held_out] - centre) @ coefficients
        assert error < ((ridge - observed) ** 2).mean()


def test_variance_is_the_squared_error_of_rows_that_are_left_out(encoder, declared, rng):
    """Each distinct row in turn, predicted with the same variances from all others."""
    table = pd.DataFrame(
        [(b, d, t) for b in "xy" for d in "abc" for t in ("none", "p")],
        columns=["batch", "donor", "drug"],
    )
    table = table.assign(hours="6")
    values = rng.normal(4, 1, (len(table), GENES))
    variances = MixedFit.of(encoder, declared, samples_of(encoder, table, values), GENES)
    errors = []
    for row in range(len(table)):
        rest = np.arange(len(table)) != row
        others = samples_of(encoder, table[rest].reset_index(drop=True), values[rest])
        without = variances.model(encoder, others)
        errors.append((predictions(without, encoder, table[~rest])[0] - values[row]) ** 2)
    np.testing.assert_allclose(variances.variance, np.mean(errors, axis=0), rtol=2e-3)


def test_unknown_and_missing_values_have_the_effects_of_what_is_known(mixed, encoder, table):
    query = table.iloc[[0, 0]].reset_index(drop=True).assign(donor=["never seen", None])
    unknown, missing = predictions(mixed, encoder, query)
    np.testing.assert_array_equal(unknown, missing)
    nothing = pd.DataFrame({"batch": [None]})
    columns = _columns(mixed, lambda term: term.name == "treated")
    treated = mixed.coefficients[columns].sum(dim=0).numpy()
    np.testing.assert_allclose(
        predictions(mixed, encoder, nothing)[0], mixed.intercept.numpy() + treated, atol=1e-5
    )


def _columns(mixed, chosen) -> list[int]:
    start, columns = 0, []
    for term in mixed.design.terms:
        if chosen(term):
            columns += range(start, start + len(term.columns))
        start += len(term.columns)
    return columns


def test_only_frequent_columns_are_kept_where_memory_ends(
    encoder, declared, table, expression, monkeypatch
):
    from pipeline.gem.model.mixed import terms

    monkeypatch.setattr(terms, "MAX_COLUMNS", 7)
    samples = samples_of(encoder, table, expression)
    design = Design.of(encoder, declared, samples.rows)
    limited = design.with_columns(encoder, samples.rows, GENES)
    assert limited.width == 7
    assert limited.matrix(encoder, samples.rows).shape[1] == 7


def test_many_rows_are_sampled_for_the_variances(encoder, declared, table, expression, monkeypatch):
    monkeypatch.setattr(fit, "VARIANCE_ROWS", 20)
    mixed = fitted(encoder, declared, samples_of(encoder, table, expression))
    error = predictions(mixed, encoder, table) - expression
    assert (error**2).mean() < 0.3


def test_without_covariates_the_prediction_is_the_mean(declared, expression):
    empty = Covariates(technical={}, biological={}, perturbation={})
    bare = declared.model_copy(update={"covariates": empty, "control": None})
    table = pd.DataFrame(index=range(60))
    encoder = MetadataEncoder.fit(table, empty)
    mixed = fitted(encoder, bare, samples_of(encoder, table, expression))
    expected = expression.mean(axis=0)
    np.testing.assert_allclose(predictions(mixed, encoder, table)[0], expected, rtol=1e-5)


def test_entries_that_are_means_of_samples_give_the_effects_of_the_samples(
    encoder, declared, table, expression
):
    """Pooled rows, with the number of samples of each, have the same mixed model equations."""
    samples = samples_of(encoder, table, expression)
    variances = MixedFit.of(encoder, declared, samples, GENES)
    mixed = variances.model(encoder, samples)
    rows = samples.rows.shape[0]
    means = np.stack([expression[samples.index == row].mean(axis=0) for row in range(rows)])
    pooled = replace(
        samples,
        index=np.arange(rows),
        blocks=lambda: [(np.arange(rows), torch.from_numpy(means))],
    )
    again = variances.model(encoder, pooled)
    np.testing.assert_allclose(again.coefficients, mixed.coefficients, atol=1e-5)
    np.testing.assert_allclose(again.intercept, mixed.intercept, atol=1e-5)


def test_known_noise_of_a_gene_shrinks_its_effects_as_that_variance_does(
    encoder, declared, table, expression
):
    samples = samples_of(encoder, table, expression)
    variances = MixedFit.of(encoder, declared, samples, GENES)
    mixed = variances.model(encoder, samples)
    noise = np.where(np.arange(GENES) < 10, 0.0, 3.0)
    noisy = variances.model(encoder, replace(samples, gene_noise=noise))
    np.testing.assert_allclose(noisy.coefficients[:, :10], mixed.coefficients[:, :10], atol=1e-6)
    (own,) = variances.variances
    larger = replace(variances, variances=(replace(own, noise=own.noise + 3.0),))
    expected = larger.model(encoder, samples).coefficients[:, 10:]
    np.testing.assert_allclose(noisy.coefficients[:, 10:], expected, atol=1e-6)


def test_similarity_of_contexts_is_the_correlation_of_their_controls(
    mixed, encoder, table, expression
):
    donors, controls = sorted(table["donor"].unique()), (table["drug"] == "none").to_numpy()
    rows = table.astype(str).agg("-".join, axis=1)
    means = pd.DataFrame(expression).groupby(rows.to_numpy()).transform("mean").to_numpy()
    first = controls & ~rows.duplicated().to_numpy()
    profiles = np.stack([means[first & (table["donor"] == d)].mean(axis=0) for d in donors])
    centred = profiles - profiles.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    expected = (1 + centred @ centred.T / np.outer(norms, norms)) / 2
    features = np.array(mixed.design.contexts.features)
    np.testing.assert_allclose(features @ features.T, expected, atol=1e-4)


def test_the_effect_in_a_similar_context_counts_more(encoder, declared, rng):
    """Two kinds of donors, of which each has its own response; a pair is held out."""
    kinds = rng.normal(0, 2, (2, GENES)), rng.normal(0, 1, (2, GENES))
    table = pd.DataFrame(
        [(d, t) for d in "abcdefgh" for t in ("none", "p") for _ in range(3)],
        columns=["donor", "drug"],
    ).assign(batch="x", hours="6")
    kind = np.array([ord(donor) % 2 for donor in table["donor"]])
    values = kinds[0][kind] + kinds[1][kind] * (table["drug"] == "p").to_numpy()[:, None]
    values = 5 + values + rng.normal(0, 0.2, values.shape)
    held_out = ((table["donor"] == "c") & (table["drug"] == "p")).to_numpy()
    train = table[~held_out].reset_index(drop=True)
    encoder = MetadataEncoder.fit(train, declared.covariates)
    samples = samples_of(encoder, train, values[~held_out])
    mixed = fitted(encoder, declared, samples)
    control = values[(table["donor"] == "c").to_numpy() & ~held_out].mean(axis=0)
    effect = predictions(mixed, encoder, table[held_out])[0] - control
    own, other = kinds[1][1], kinds[1][0]
    assert ((effect - own) ** 2).mean() < 0.3 * ((effect - other) ** 2).mean()


def test_two_conditions_with_replicates_keep_their_means(encoder, declared, rng):
    """Nothing tells the effect of the treatment from that of its metadata row."""
    table = pd.DataFrame({"drug": ["none", "p"] * 20}).assign(donor="a", batch="x", hours="6")
    values = rng.normal(5, 0.3, (40, GENES))
    values[1::2] += rng.normal(0, 1, GENES)
    encoder = MetadataEncoder.fit(table, declared.covariates)
    mixed = fitted(encoder, declared, samples_of(encoder, table, values))
    means = np.stack([values[0::2].mean(axis=0), values[1::2].mean(axis=0)])
    np.testing.assert_allclose(predictions(mixed, encoder, table[:2]), means, atol=0.05)


def test_genes_of_a_class_share_variances_and_have_their_own_noise(encoder, declared, table, rng):
    """Half of the genes are expressed less and are noisier; the rest of the data is alike."""
    levels = {name: rng.normal(0, 1, (9, 200)) for name in ("donor", "drug")}
    codes = {name: pd.factorize(table[name])[0] for name in levels}
    deviation = np.where(np.arange(200) < 100, 2.0, 0.2)
    values = np.where(np.arange(200) < 100, 1.0, 8.0) + sum(levels[n][codes[n]] for n in levels)
    values = values + rng.normal(0, deviation, values.shape)
    samples = samples_of(encoder, table, values)
    samples = replace(samples, gene_weights=np.ones(200), gene_noise=np.zeros(200))
    two = MixedFit.of(encoder, declared, samples, 200)
    np.testing.assert_array_equal(two.gene_class, np.arange(200) >= 100)
    low, high = two.variances
    assert low.noise > 3 * high.noise
    mixed = two.model(encoder, samples)
    for number, genes in enumerate((slice(0, 100), slice(100, 200))):
        own = replace(mixed, variances=(mixed.variances[number],))
        expected = best_linear_unbiased(own, table, values[:, genes], table)
        np.testing.assert_allclose(
            predictions(mixed, encoder, table)[:, genes], expected, atol=5e-3
        )


def test_a_design_in_chunks_of_rows_gives_the_same_model(
    encoder, declared, table, expression, monkeypatch
):
    samples = samples_of(encoder, table, expression, size=13)
    whole = MixedFit.of(encoder, declared, samples, GENES).model(encoder, samples)
    for module in (fit, terms):
        monkeypatch.setattr(module, "ROWS", 7)
    assert samples.rows.shape[0] > 7
    again = MixedFit.of(encoder, declared, samples, GENES).model(encoder, samples)
    assert again.design == whole.design
    torch.testing.assert_close(again.coefficients, whole.coefficients, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.intercept, whole.intercept)
