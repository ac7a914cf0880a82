"""The networks of GEM: parity with the public reference, starting point, structure and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import (
    GENES,
    HEADS,
    METADATA_SIZES,
    batch,
    levels,
    network,
    sparse,
    untrained_network,
)
from support.settings import ROOT

from pipeline.gem.common.config import GROUPS, Latent
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.model.metadata.layers import TargetEffect
from pipeline.gem.model.network import (
    INPUT_EPSILON,
    Gaussian,
    Interaction,
    Network,
)
from pipeline.gem.model.normal import LOG_VARIANCE_RANGE, kl_normal, normal_log_likelihood
from pipeline.gem.model.observation import GeneMoments, LatentSource

# Weights, inputs, noise and outputs of the public reference implementation (synthesizebio/gem-1).
GEM1 = ROOT / "tests" / "fixtures" / "gem1_forward.npz"
GEM1_DECODER = {"additive_technical": False, "interactions": 0}
assert_close = torch.testing.assert_close


# --- parity with the public reference ---


@pytest.fixture(scope="module")
def gem1() -> dict[str, torch.Tensor]:
    with np.load(GEM1) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def gem1_network(params, gem1) -> Network:
    """Our network with the reference's weights."""
    sizes = {"hidden": 8, "blocks": 2, "prior_blocks": 2, "expansion": 2, "dropout": 0.0}
    latent = Latent(technical=2, biological=3, perturbation=2)
    other = {"latent": latent, "linear_decoder": False, "min_variance": 1e-9}
    model = params.model.model_copy(update=sizes | other | GEM1_DECODER)
    net = untrained_network(model, 12, METADATA_SIZES, {})
    # In a residual block the reference numbers LayerNorm, Linear, ReLU, Dropout, Linear 0 to 4.
    renamed = {"prior_nets": "priors", "ff.0": "norm", "ff.1": "widen", "ff.4": "narrow"}
    state = {}
    for name, value in gem1.items():
        if name.startswith(("weight/prior_nets", "weight/encoder", "weight/decoder")):
            own_name = name.removeprefix("weight/")
            for theirs, ours in renamed.items():
                own_name = own_name.replace(theirs, ours)
            # Ours stores the first layer of a prior by input.
            is_input = own_name.startswith("priors") and own_name.endswith(".0.weight")
            state[own_name] = value.T if is_input else value
    state["observation.log_variances"] = gem1["weight/log_variance"].expand(4, 12)
    net.load_state_dict(net.state_dict() | state)
    # The reference's layer norm of the input has a scale and a shift: our first layer absorbs them.
    gamma, beta = gem1["weight/input_norm.weight"], gem1["weight/input_norm.bias"]
    with torch.no_grad():
        net.encoder[0].bias.add_(net.encoder[0].weight @ beta)
        net.encoder[0].weight.mul_(gamma)
    return net.eval()


def gaussian(gem1: dict[str, torch.Tensor], kind: str) -> Gaussian:
    """The reference's prior or posterior over the latents of all groups."""
    parts = ([gem1[f"{kind}/{group}/{part}"] for group in GROUPS] for part in ("mean", "logvar"))
    return Gaussian(*(torch.cat(part, dim=1) for part in parts))


def test_input_is_that_of_the_reference(gem1):
    counts = gem1["input/counts"].numpy()
    expression = torch.from_numpy(log_cpm(counts, counts.sum(axis=1)))
    assert_close(expression, gem1["input/log_cpm"], rtol=1e-6, atol=1e-5)
    gamma, beta = gem1["weight/input_norm.weight"], gem1["weight/input_norm.bias"]
    normalised = F.layer_norm(expression, (12,), gamma, beta, INPUT_EPSILON)
    assert_close(normalised, gem1["input/normalised"], rtol=0, atol=1e-5)


def test_priors_and_posteriors_are_those_of_the_reference(gem1_network, gem1):
    one_hot = {
        group: sparse(F.one_hot(gem1[f"input/{group}"], METADATA_SIZES[group]).float())
        for group in GROUPS
    }
    prior = gem1_network.joint_prior(one_hot, dict.fromkeys(GROUPS, torch.arange(5)))
    posterior = gem1_network.posterior(gem1["input/log_cpm"])
    assert_close(tuple(prior), tuple(gaussian(gem1, "prior")), rtol=0, atol=1e-5)
    assert_close(tuple(posterior), tuple(gaussian(gem1, "posterior")), rtol=0, atol=1e-5)


def test_decoded_samples_and_losses_are_those_of_the_reference(gem1_network, gem1):
    prior, posterior = gaussian(gem1, "prior"), gaussian(gem1, "posterior")
    noise = torch.cat([gem1[f"noise/{group}"] for group in GROUPS], dim=1)
    latents = posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise
    decoded = gem1_network.decode(latents)
    divergence = kl_normal(*posterior, *prior).mean(dim=0)
    log_variance = gem1_network.observation.log_variance(LatentSource.POSTERIOR)
    # The reference's reconstruction loss is a mean over genes; ours is a sum.
    log_density = normal_log_likelihood(gem1["input/normalised"], decoded, log_variance)
    reconstruction = -log_density.mean() / 12
    expected = {
        "output/x_recon": decoded,
        "output/decoded_prior_mean": gem1_network.decode(prior.mean),
        "output/kl_loss": divergence.sum(),
        "output/recon_loss": reconstruction,
        "output/loss": reconstruction + gem1["input/beta"] * divergence.sum(),
    }
    slices = gem1_network.slices().items()
    expected |= {f"kl/{group}": divergence[columns].sum() for group, columns in slices}
    for name, value in expected.items():
        assert_close(value, gem1[name], rtol=0, atol=1e-5, msg=name)


# --- the starting point ---


@pytest.mark.parametrize("linear", [True, False])
def test_decoder_starts_at_the_training_mean_and_noise_at_the_training_variance(
    small_model, linear
):
    torch.manual_seed(0)
    net = untrained_network(
        small_model.model_copy(update=GEM1_DECODER | {"linear_decoder": linear})
    )
    mean, variance = torch.linspace(0, 9, GENES), torch.linspace(0.05, 3, GENES)
    expression = mean + variance.sqrt() * torch.tensor([-1.0, 0.0, 1.0])[:, None]
    net.initialise(GeneMoments.of(expression.split(2)))
    assert_close(net.decoder[-1].bias.detach(), mean)
    if linear:  # the nonlinear part starts at zero: latents of zero decode to the mean
        assert_close(net.decode(torch.zeros(2, 7)).detach(), mean.expand(2, GENES))
    for source in LatentSource:
        assert_close(net.observation.log_variance(source).detach().exp(), variance)


def test_untrained_decoder_with_a_linear_path_is_linear(small_model, generator):
    torch.manual_seed(0)
    net = untrained_network(small_model.model_copy(update=GEM1_DECODER)).eval()
    first, second = torch.randn(2, 4, 7, generator=generator)
    origin = net.decode(torch.zeros(4, 7))
    combined = net.decode(first) - origin + 2 * (net.decode(second) - origin)
    assert_close(net.decode(first + 2 * second) - origin, combined, rtol=1e-4, atol=1e-5)


# --- the parts ---


def test_linear_decoder_adds_a_linear_map_of_the_latents(small_model, generator):
    net = network(small_model.model_copy(update=GEM1_DECODER))
    latents = torch.randn(5, 7, generator=generator)
    linear = latents @ net.linear_decoder.weight.T
    assert_close(net.decode(latents) - net.decoder(latents), linear, rtol=1e-4, atol=1e-5)
    without = small_model.model_copy(update=GEM1_DECODER | {"linear_decoder": False})
    assert network(without).linear_decoder is None


def test_latent_log_variances_are_clamped(small_model):
    net, data = network(small_model.model_copy(update=GEM1_DECODER)), batch()
    with torch.no_grad():
        for part in (net.encoder, *net.priors.values()):
            bias = part[-1].bias
            bias.copy_(torch.where(torch.arange(len(bias)) % 2 == 0, 1e4, -1e4))
    for latents in (net.posterior(data.observed.expression), joint_prior(net, data)):
        limits = latents.log_variance.min().item(), latents.log_variance.max().item()
        assert limits == LOG_VARIANCE_RANGE


def joint_prior(net: Network, data) -> Gaussian:
    return net.joint_prior(data.metadata, data.index)


def test_observation_variances_stay_above_their_floor(small_model):
    net = network(small_model.model_copy(update={"min_variance": 0.02}))
    with torch.no_grad():
        net.observation.log_variances.copy_(torch.linspace(-50, 50, GENES).expand(4, GENES))
    for source in LatentSource:
        variance = net.observation.log_variance(source).exp()
        assert variance.min().item() == pytest.approx(0.02, rel=1e-5)
        assert variance.max().item() == pytest.approx(math.exp(LOG_VARIANCE_RANGE[1]), rel=1e-5)


def test_posterior_does_not_depend_on_the_other_samples_of_a_batch(small_model):
    net, expression = network(small_model), batch().observed.expression
    alone = torch.cat([net.posterior(row[None]).mean for row in expression])
    assert_close(alone, net.posterior(expression).mean, rtol=1e-5, atol=1e-6)


def test_prior_of_distinct_rows_is_the_prior_of_all_rows(small_model, rng):
    net, matrix = network(small_model), (rng.random((50, 3)) < 0.5).astype(np.float32)
    unique, index = np.unique(matrix, axis=0, return_inverse=True)
    distinct = net.prior("technical", sparse(torch.from_numpy(unique)))
    every = net.prior("technical", sparse(torch.from_numpy(matrix)))
    rows = distinct.rows(torch.from_numpy(index))
    assert_close(tuple(rows), tuple(every), rtol=1e-5, atol=1e-6)


def test_a_group_without_covariates_has_one_prior_for_all_samples(small_model):
    sizes = METADATA_SIZES | {"technical": 0}
    net, data = network(small_model, sizes=sizes), batch(sizes=sizes)
    data = replace(data, metadata=data.metadata | {"technical": sparse(torch.zeros(1, 0))})
    data = replace(data, index=data.index | {"technical": torch.zeros(6, dtype=torch.long)})
    mean = joint_prior(net, data).mean
    assert torch.equal(mean[:, :2], mean[:1, :2].expand(6, 2))


def test_conditioning_takes_the_named_groups_from_the_reference(small_model, generator):
    net = network(small_model)
    prior, reference = (Gaussian(*torch.randn(2, 4, 7, generator=generator)) for _ in range(2))
    for groups in ((), ("technical",), ("biological", "perturbation"), GROUPS):
        mixed = net.condition(prior, reference, groups)
        for group, columns in net.slices().items():
            source = reference if group in groups else prior
            for part, expected in zip(mixed, source, strict=True):
                assert torch.equal(part[:, columns], expected[:, columns])


def test_label_heads_depend_on_the_latents_of_their_own_group_only(small_model):
    net, latents = network(small_model), torch.zeros(1, 7, requires_grad=True)
    for name, (group, _) in HEADS.items():
        logits = net.classify(latents)[name]
        (gradient,) = torch.autograd.grad(logits.square().sum() + logits.sum(), latents)
        expected = torch.zeros(7, dtype=torch.bool)
        expected[net.slices()[group]] = True
        assert torch.equal(gradient[0] != 0, expected)


# --- effects of technical levels, perturbations, target genes and references ---


def test_technical_latents_add_the_same_effect_to_every_sample(small_model, generator):
    net = network(small_model)
    latents = torch.randn(5, 7, generator=generator)
    shifted = latents.clone()
    shifted[:, net.slices()["technical"]] += torch.randn(1, 2, generator=generator)
    change = net.decode(shifted) - net.decode(latents)
    assert_close(change, change[:1].expand_as(change), rtol=1e-4, atol=1e-5)
    assert change.abs().max() > 1e-3


def test_the_technical_prior_is_linear_in_its_levels(small_model):
    net = network(small_model)
    rows = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 0], [1.0, 1, 0]])
    with torch.no_grad():
        none, first, second, both = net.prior("technical", sparse(rows)).mean
    assert_close(both - none, (first - none) + (second - none), rtol=1e-5, atol=1e-6)


def test_an_interaction_is_the_sum_over_programs_of_response_times_loading(generator):
    module = Interaction(3, 2, 4, 6)
    biological = torch.randn(2, 3, generator=generator)
    perturbation = torch.randn(2, 2, generator=generator)
    result = module.program(module.strength(biological, perturbation))
    for sample in range(2):
        expected = torch.zeros(6)
        for program in range(4):
            weight = module.response.weight[program] @ biological[sample]
            response = module.response.bias[program] + weight
            loading = module.loading.weight[program] @ perturbation[sample]
            expected += response * loading * module.program.weight[:, program]
        assert_close(result[sample], expected, rtol=1e-4, atol=1e-5)
    assert (module.strength(biological, torch.zeros(2, 2)) == 0).all()


def test_a_target_effect_changes_the_target_genes_only(small_model, generator):
    decoded = torch.randn(3, 9, generator=generator)
    target_gene = torch.tensor([[4, 7], [0, -1], [-1, -1]])
    effect = torch.tensor([1.5, -2.0, 4.0])
    expected = decoded.clone()
    expected[0, 4] += 1.5
    expected[0, 7] += 1.5
    expected[1, 0] -= 2.0
    result = network(small_model).add_target_effect(decoded, target_gene, effect)
    assert_close(result, expected)


def test_target_effects_do_not_depend_on_the_identity_of_the_perturbation(generator):
    module = TargetEffect([levels("perturbation", 4)], [False, False, True, True])
    with torch.no_grad():
        module.narrow.weight.normal_(generator=generator)
    rows = torch.rand(2, 4, generator=generator)
    rows[1, 2:] = rows[0, 2:]
    first, second = module(sparse(rows)).tolist()
    assert first == pytest.approx(second)


def test_the_residual_of_a_reference_is_gated_by_its_surprise(small_model, generator):
    net = network(small_model)
    with torch.no_grad():
        net.residual_gate[0], net.residual_gate[1] = -1.0, 2.0
    reference = 5 * torch.rand(2, 9, generator=generator)
    posterior = net.posterior(reference)
    decoded = net.decode(posterior.mean)
    residual = reference - decoded
    variance = net.observation.log_variance(LatentSource.POSTERIOR).exp()
    surprise = (residual**2 / variance).mean(dim=1, keepdim=True).log()
    expected = residual / (1 + torch.exp(1.0 - 2.0 * surprise))
    result = net.reference_residual(reference, decoded)
    assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_reference_that_the_latents_explain_has_no_residual(small_model):
    net = network(small_model)
    decoded = net.decode(torch.zeros(2, 7))
    assert net.reference_residual(decoded, decoded).abs().max() == 0
