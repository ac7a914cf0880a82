"""A trained model's predictions: from metadata, from a reference, and their randomness."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from support.generation import generate

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.query import TargetGenes

ROWS = 12


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def encoder(cohort) -> MetadataEncoder:
    train, covariates = cohort.rows(["train"]), cohort.declared.covariates
    return MetadataEncoder.fit(train, covariates, cohort.features)


@pytest.fixture(scope="module")
def gem(params, cohort, encoder) -> TrainedGEM:
    """Untrained and in general position: its predictions depend on every weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gem = TrainedGEM.build(cohort.genes, encoder, TargetGenes.from_cohort(cohort), params.model)
        with torch.no_grad():
            for parameter in gem.network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    gem.network.eval()
    return gem


@pytest.fixture(scope="module")
def samples(cohort) -> pd.DataFrame:
    return cohort.rows(["train"]).head(ROWS)


@pytest.fixture(scope="module")
def references(cohort) -> np.ndarray:
    return cohort.expression(["train"])[20 : 20 + ROWS]


# --- compatibility with a cohort ---


def test_other_genes_are_refused_with_the_difference(gem):
    gem.require_genes(gem.genes.copy())
    with pytest.raises(IntegrityError, match=f"1 missing .*{gem.genes[0]}.*1 unknown .*stranger"):
        gem.require_genes(np.array([*gem.genes[1:], "stranger"]))
    with pytest.raises(IntegrityError, match=r"0 missing.*0 unknown.*in another order"):
        gem.require_genes(gem.genes[::-1])


def test_another_vocabulary_is_refused_with_the_difference(gem, cohort, encoder):
    covariates, train = cohort.declared.covariates, cohort.rows(["train"])
    gem.require_vocabulary(encoder)
    tissue = train["tissue"].iloc[0]
    other_tissue = train.assign(tissue=train["tissue"].astype(object).replace(tissue, "spleen"))
    technical = {"technical": {"study": covariates.technical["study"]}}
    cases = {
        rf"tissue: .*{tissue}.*spleen": (other_tissue, covariates),
        "age_years: mean": (train.assign(age_years=train["age_years"] + 1), covariates),
        "library_layout, .* the model only": (train, covariates.model_copy(update=technical)),
    }
    for message, (table, declared) in cases.items():
        with pytest.raises(IntegrityError, match=message):
            gem.require_vocabulary(MetadataEncoder.fit(table, declared, cohort.features))


# --- predictions ---


@pytest.mark.parametrize("from_reference", [False, True])
def test_mean_prediction_is_deterministic_and_row_by_row(gem, samples, references, from_reference):
    reference = references if from_reference else None
    mean = generate(gem, samples, reference)
    assert mean.shape == (ROWS, len(gem.genes))
    np.testing.assert_array_equal(mean, generate(gem, samples, reference))
    part = generate(gem, samples.iloc[3:7], references[3:7] if from_reference else None)
    np.testing.assert_allclose(part, mean[3:7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drawn", [("latents",), ("noise",), ("latents", "noise")])
def test_draws_depend_on_the_seed(gem, samples, drawn):
    first, again, other = (
        generate(gem, samples, **dict.fromkeys(drawn, seeded(seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_prediction_neither_reads_nor_changes_the_global_random_state(gem, samples, references):
    before = torch.random.get_rng_state()
    draws = generate(gem, samples, references, latents=seeded(0), noise=seeded(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(77)
    again = generate(gem, samples, references, latents=seeded(0), noise=seeded(1))
    np.testing.assert_array_equal(again, draws)


@pytest.mark.parametrize("source", [LatentSource.PRIOR, LatentSource.REFERENCE])
def test_observation_noise_has_the_variance_of_the_latent_source(gem, samples, references, source):
    table = pd.concat([samples] * 400)
    repeated = np.concatenate([references] * 400) if source == LatentSource.REFERENCE else None
    noise = generate(gem, table, repeated, noise=seeded(0)) - generate(gem, table, repeated)
    expected = gem.network.observation.log_variance(source).detach().exp().numpy()
    ratio, mean = noise.var(axis=0) / expected, noise.mean(axis=0) / np.sqrt(expected)
    np.testing.assert_allclose(ratio, 1, atol=5 * math.sqrt(2 / len(table)))
    np.testing.assert_allclose(mean, 0, atol=5 / math.sqrt(len(table)))


# --- conditioning and metadata ---


def test_unknown_conditioning_group_is_refused(gem, samples, references):
    with pytest.raises(InputError, match=r"biologcal.*known: technical, biological, perturbation"):
        generate(gem, samples, references, ("technical", "biologcal"))


def test_conditioning_on_every_group_ignores_the_metadata(gem, samples, references):
    # But for the effect on the target gene, which is no latent.
    samples = samples.assign(perturbation="control")
    reverse = samples.iloc[::-1]
    np.testing.assert_array_equal(
        generate(gem, samples, references, GROUPS), generate(gem, reverse, references, GROUPS)
    )
    assert not np.array_equal(generate(gem, samples), generate(gem, reverse))


def test_conditioning_on_no_group_ignores_the_reference(gem, samples, references):
    np.testing.assert_array_equal(generate(gem, samples, references, ()), generate(gem, samples))


def test_default_conditioning_takes_only_the_perturbation_from_the_metadata(
    gem, samples, references
):
    other = dict.fromkeys(("study", "tissue", "cell_type", "sex", "age_years"))
    np.testing.assert_array_equal(
        generate(gem, samples, references), generate(gem, samples.assign(**other), references)
    )


def test_a_reference_index_shares_references_between_samples(gem, samples, references):
    index = np.arange(ROWS) % 2
    inputs = gem.decoder_input(samples, references[:2], reference_index=index)
    expected = gem.decoder_input(samples, references[index])
    for part, value in zip(
        (*inputs.latents, *inputs[1:]), (*expected.latents, *expected[1:]), strict=True
    ):
        torch.testing.assert_close(part, value, rtol=1e-4, atol=1e-5)


def test_unknown_levels_are_refused_or_missing_on_request(gem, samples):
    unknown = samples.assign(perturbation="never seen")
    with pytest.raises(InputError, match="never seen"):
        generate(gem, unknown)
    missing = generate(gem, samples.assign(perturbation=None))
    np.testing.assert_array_equal(generate(gem, unknown, unknown="missing"), missing)
