"""The networks of GEM, the terms of the objective, and the model file."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from support.generation import generate
from support.networks import GENES, HEADS, METADATA_SIZES, batch, build, network
from support.settings import ROOT
from torch.distributions import Normal, kl_divergence

from pipeline.gem.common.config import GROUPS, KLWeight, Latent
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import (
    TargetGenes,
    TrainedGEM,
    decode,
    distinct_rows,
    predictive_log_likelihood,
)
from pipeline.gem.model.network import (
    INPUT_EPSILON,
    POSTERIOR,
    PRIOR,
    REFERENCE_SAMPLE,
    UNSEEN_STUDY,
    Batch,
    Gaussian,
    Network,
    objective,
)
from pipeline.gem.model.normal import LOG_VARIANCE_RANGE, kl_normal, normal_log_likelihood
from pipeline.gem.model.observation import Observed

REFERENCE = ROOT / "tests" / "fixtures" / "reference_forward.npz"
LATENT_SOURCES = {
    "nll_reconstruction": POSTERIOR,
    "nll_predictive": PRIOR,
    "nll_reference": REFERENCE_SAMPLE,
    "nll_unseen_study": UNSEEN_STUDY,
}
PLAIN = {"additive_technical": False, "interactions": 0}  # the decoder of the public reference


@pytest.fixture
def small(params):
    """Model parameters of a network that costs nothing; without dropout, so that only latents are random."""
    sizes = {
        "latent": Latent(technical=2, biological=3, perturbation=2),
        "hidden": 8,
        "blocks": 1,
        "prior_blocks": 1,
    }
    return params.model.model_copy(update=sizes | {"dropout": 0.0})


def rows_of(whole: Batch, rows) -> Batch:
    chosen = {
        name: getattr(whole, name)[rows] for name in ("reference", "shift", "target", "labels")
    } | {"observed": whole.observed.rows(rows)}
    return replace(
        whole, **chosen, index={group: index[rows] for group, index in whole.index.items()}
    )


def deaf(made: Network) -> Network:
    """The same network with a decoder and heads that hear no latents: its terms do not depend on the noise."""
    with torch.no_grad():
        made.decoder[-1].weight.zero_()
        if made.linear_decoder is not None:
            made.linear_decoder.weight.zero_()
        if made.interaction is not None:
            made.interaction.program.weight.zero_()
        for head in made.heads.values():
            head.weight.zero_()
    return made


# --- parity with the public reference -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(REFERENCE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def twin(params, reference) -> Network:
    """Our network with the reference's weights."""
    model = params.model.model_copy(
        update={
            "latent": Latent(technical=2, biological=3, perturbation=2),
            "hidden": 8,
            "blocks": 2,
            "prior_blocks": 2,
            "expansion": 2,
            "dropout": 0.0,
            "linear_decoder": False,
            "min_variance": 1e-9,
        }
        | PLAIN
    )
    made = build(12, METADATA_SIZES, {}, model)
    # Inside a residual block the reference numbers LayerNorm, Linear, ReLU, Dropout, Linear from 0 to 4.
    inside = {"ff.0": "norm", "ff.1": "widen", "ff.4": "narrow"}
    state = {}
    for name, value in reference.items():
        if name.startswith(("weight/prior_nets", "weight/encoder", "weight/decoder")):
            ours = name.removeprefix("weight/").replace("prior_nets", "priors")
            for theirs, replacement in inside.items():
                ours = ours.replace(theirs, replacement)
            state[ours] = value
    state["observation.log_variances"] = reference["weight/log_variance"].expand(
        len(made.observation.log_variances), 12
    )
    # The reference's encoder gives the means of all groups, then the log variances of all groups; ours gives both group after group.
    for name in ("encoder.4.weight", "encoder.4.bias"):
        means, log_variances = (half.split([2, 3, 2]) for half in state[name].chunk(2))
        state[name] = torch.cat(
            [part for pair in zip(means, log_variances, strict=True) for part in pair]
        )
    made.load_state_dict(made.state_dict() | state)
    # The reference scales and shifts the normalised input; ours does not. The first layer of the encoder absorbs both.
    gamma, beta = reference["weight/input_norm.weight"], reference["weight/input_norm.bias"]
    with torch.no_grad():
        made.encoder[0].bias.add_(made.encoder[0].weight @ beta)
        made.encoder[0].weight.mul_(gamma)
    return made.eval()


def _one_hot(reference, group):
    return F.one_hot(reference[f"input/{group}"], METADATA_SIZES[group]).float()


def _latents(reference, kind, part):
    return torch.cat([reference[f"{kind}/{group}/{part}"] for group in GROUPS], dim=1)


def test_the_references_input_is_reproduced(reference):
    from pipeline.gem.data.expression import log_cpm

    counts = reference["input/counts"].numpy()
    expression = torch.from_numpy(log_cpm(counts, counts.sum(axis=1)))
    torch.testing.assert_close(expression, reference["input/log_cpm"], rtol=1e-6, atol=1e-5)
    normalised = F.layer_norm(
        expression,
        (12,),
        reference["weight/input_norm.weight"],
        reference["weight/input_norm.bias"],
        INPUT_EPSILON,
    )
    torch.testing.assert_close(normalised, reference["input/normalised"], rtol=0, atol=1e-5)


def test_the_references_priors_and_posteriors_are_reproduced(twin, reference):
    index = {group: torch.arange(5) for group in GROUPS}
    prior = twin.joint_prior({group: _one_hot(reference, group) for group in GROUPS}, index)
    posterior = twin.posterior(reference["input/log_cpm"])
    for kind, found in (("prior", prior), ("posterior", posterior)):
        torch.testing.assert_close(found.mean, _latents(reference, kind, "mean"), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            found.log_variance, _latents(reference, kind, "logvar"), rtol=0, atol=1e-5
        )


def test_the_references_decoded_samples_and_losses_are_reproduced(twin, reference):
    prior, posterior = (
        Gaussian(_latents(reference, kind, "mean"), _latents(reference, kind, "logvar"))
        for kind in ("prior", "posterior")
    )
    noise = torch.cat([reference[f"noise/{group}"] for group in GROUPS], dim=1)
    decoded = twin.decode(posterior.mean + torch.exp(0.5 * posterior.log_variance) * noise)
    torch.testing.assert_close(decoded, reference["output/x_recon"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        twin.decode(prior.mean), reference["output/decoded_prior_mean"], rtol=0, atol=1e-5
    )
    divergence = kl_normal(*posterior, *prior).mean(dim=0)
    for group, place in twin.slices().items():
        torch.testing.assert_close(
            divergence[place].sum(), reference[f"kl/{group}"], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(divergence.sum(), reference["output/kl_loss"], rtol=0, atol=1e-5)
    # The reference's reconstruction is a mean over genes too; ours sums them.
    summed = -normal_log_likelihood(
        reference["input/normalised"], decoded, twin.observation.log_variance(POSTERIOR)
    ).mean()
    torch.testing.assert_close(summed / 12, reference["output/recon_loss"], rtol=0, atol=1e-5)
    loss = summed / 12 + reference["input/beta"] * divergence.sum()
    torch.testing.assert_close(loss, reference["output/loss"], rtol=0, atol=1e-5)


# --- the terms of the objective -------------------------------------------------------------------------------------


@pytest.mark.parametrize("referred", [6, 2, 0])
@torch.no_grad()
def test_terms_are_sums_over_genes_and_latents_averaged_over_samples_once(small, referred):
    """The conditioned term is computed on the samples that have a reference in the batch, the first `referred`."""
    made, size, whole = network(small), 6, batch()
    data = replace(
        whole, reference=whole.reference[:referred], shift=whole.shift[:referred], short={}
    )
    terms = made(data, torch.Generator().manual_seed(5))
    # The same noise, drawn in the order posterior, prior, conditioned, new study; then everything sample by sample.
    generator = torch.Generator().manual_seed(5)
    noise = {
        "nll_reconstruction": (size, 7),
        "nll_predictive": (size, 7),
        "nll_reference": (referred, 7),
        "nll_unseen_study": (size, 2),
    }
    noise = {
        name: torch.randn(*shape, generator=generator) for name, shape in noise.items() if shape[0]
    }
    expected = {
        name: 0.0 for name in (*noise, "classification", *(f"kl_{group}" for group in GROUPS))
    }
    for row in range(size):
        of_row = {group: data.metadata[group][data.index[group][row]][None] for group in GROUPS}
        parts = [made.prior(group, of_row[group]) for group in GROUPS]
        prior = Gaussian(*(torch.cat([part[kind] for part in parts], 1) for kind in (0, 1)))
        posterior, control = (
            made.posterior(data.expression[row][None]),
            made.posterior((whole.reference + whole.shift)[row][None]),
        )
        unknown = made.prior("technical", data.new_study[data.index["technical"][row]][None])
        # technical and biological (5 of 7 latents) from the reference, perturbation from the prior
        mixed = Gaussian(
            *(torch.cat([control[kind][:, :5], prior[kind][:, 5:]], 1) for kind in (0, 1))
        )
        drawn = {
            name: source.mean + torch.exp(0.5 * source.log_variance) * noise[name][row]
            for name, source in zip(
                noise, [posterior, prior, *([mixed] if referred else []), unknown], strict=True
            )
            if row < len(noise[name])
        }
        # In a study that nobody knows the technical latents are other ones, everything else is as predicted.
        drawn["nll_unseen_study"] = torch.cat(
            [drawn["nll_unseen_study"], drawn["nll_predictive"][:, 2:]], 1
        )
        for name, latents in drawn.items():
            mean = made.decode(latents)[0]
            if data.target[row] >= 0:
                mean[data.target[row]] += made.target_effect(of_row["perturbation"])[0]
            if name == "nll_reference":
                mean = (
                    mean
                    + made.carried((whole.reference + whole.shift)[row][None], control)[0]
                    - whole.shift[row]
                )
            density = Normal(
                mean, torch.exp(0.5 * made.observation.log_variance(LATENT_SOURCES[name]))
            )
            expected[name] -= float(density.log_prob(data.expression[row]).sum()) * (
                size / referred if name == "nll_reference" else 1
            )
        for head, logits in enumerate(made.classify(drawn["nll_reconstruction"]).values()):
            if data.labels[row, head] >= 0:
                expected["classification"] -= float(
                    logits[0].log_softmax(0)[data.labels[row, head]]
                )
        divergence = kl_divergence(
            *(
                Normal(part.mean[0], torch.exp(0.5 * part.log_variance[0]))
                for part in (posterior, prior)
            )
        )
        for group, place in made.slices().items():
            expected[f"kl_{group}"] += float(divergence[place].sum())
    assert set(terms) == set(expected)
    for name, value in terms.items():
        assert float(value.sum()) == pytest.approx(expected[name] / size, rel=1e-4, abs=1e-4), name


def test_terms_that_need_no_batch_of_their_own_can_be_left_out(small, generator):
    data = replace(
        batch(),
        reference=torch.zeros(0, GENES),
        shift=torch.zeros(0, GENES),
        new_study=torch.zeros(0, 3),
    )
    assert not {"nll_reference", "nll_unseen_study"} & set(network(small)(data, generator))


def test_the_terms_of_a_batch_are_the_weighted_mean_of_those_of_its_parts(small, generator):
    made, whole = deaf(network(small)), batch(size=9)
    parts = (slice(0, 3), slice(3, 9))
    terms = made(whole, generator)
    of_parts = [made(rows_of(whole, rows), generator) for rows in parts]
    for name, value in terms.items():
        torch.testing.assert_close(
            value, (3 * of_parts[0][name] + 6 * of_parts[1][name]) / 9, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_terms_do_not_depend_on_the_batch_size_in_expectation(small, generator):
    made, data = network(small), batch(size=4)

    def repeated(times, draws):
        tiled = rows_of(data, torch.arange(4).repeat(times))
        terms = [
            {name: float(value.sum()) for name, value in made(tiled, generator).items()}
            for _ in range(draws)
        ]
        return pd.DataFrame(terms)

    few, many = repeated(20, 200), repeated(400, 10)
    for name in few:
        error = math.hypot(few[name].sem(), many[name].sem())
        assert abs(few[name].mean() - many[name].mean()) < 5 * error + 1e-4, name


@torch.no_grad()
def test_repeating_every_gene_doubles_the_likelihood_terms_and_leaves_the_divergence(small):
    made, data = (
        network(small),
        replace(batch(), target=torch.full((6,), -1)),
    )  # a gene that is hit is one gene, not two
    double = network(small, genes=2 * GENES)
    state = made.state_dict()
    for name, value in state.items():
        if value.shape[0] == GENES:
            state[name] = torch.cat([value, value])
        elif name in ("observation.log_variances", "residual_gate"):
            state[name] = torch.cat([value, value], dim=1)
    # The normalised input repeats too, so half of each weight twice over encodes the same.
    state["encoder.0.weight"] = torch.cat([state["encoder.0.weight"]] * 2, dim=1) / 2
    double.load_state_dict(state)
    twice = replace(
        data, **{name: torch.cat([getattr(data, name)] * 2, 1) for name in ("reference", "shift")}
    )
    twice = replace(twice, observed=Observed(torch.cat([data.expression] * 2, 1)))
    single, both = (
        net(rows, torch.Generator().manual_seed(2)) for net, rows in ((made, data), (double, twice))
    )
    for name in single:
        torch.testing.assert_close(
            both[name], (2 if name in LATENT_SOURCES else 1) * single[name], rtol=1e-4, atol=1e-4
        )


def test_the_decoders_noise_in_each_term_is_its_own(small, generator):
    made, data = network(small), batch()
    for name, way in LATENT_SOURCES.items():
        made.zero_grad(set_to_none=True)
        made(data, generator)[name].backward()
        moved = made.observation.log_variances.grad.abs().sum(dim=1) > 0
        assert moved.tolist() == [
            row == way or (row == POSTERIOR and way == REFERENCE_SAMPLE) for row in range(4)
        ]


def test_conditioning_reaches_the_reference_only_through_the_technical_and_biological_groups(
    small, generator
):
    made, data = network(small), batch()
    data = replace(data, reference=data.reference.requires_grad_())
    gradients = torch.autograd.grad(
        made(data, generator)["nll_reference"],
        [data.reference, *made.priors.parameters()],
        allow_unused=True,
    )
    assert gradients[0].abs().sum() > 0
    names = [name for name, _ in made.priors.named_parameters()]
    for name, gradient in zip(names, gradients[1:], strict=True):
        if name.startswith("perturbation"):
            assert gradient.abs().sum() > 0
        else:
            assert gradient.abs().sum() == 0


def test_missing_labels_contribute_nothing(small):
    made, data = network(small), batch()
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    missing = replace(data, labels=torch.full_like(data.labels, -1))
    term = made(missing, seeds[0])["classification"]
    assert term.item() == 0.0
    term.backward()
    assert all(
        parameter.grad is None or parameter.grad.abs().sum() == 0 for parameter in made.parameters()
    )
    # One head without labels leaves the others' sum as it is.
    one_missing = data.labels.clone()
    one_missing[:, 1] = -1
    made.zero_grad(set_to_none=True)
    made(replace(data, labels=one_missing), seeds[1])["classification"].backward()
    assert made.heads["sex"].weight.grad.abs().sum() == 0
    assert made.heads["tissue"].weight.grad.abs().sum() > 0


def test_a_head_with_one_level_costs_nothing(small):
    heads = {"tissue": ("biological", 1)}
    made, data = network(small, heads=heads), batch(heads=heads)
    known = replace(data, labels=torch.zeros_like(data.labels))
    assert made(known, torch.Generator().manual_seed(0))["classification"].item() == 0.0
    assert made.classify(torch.zeros(2, 7))["tissue"].shape == (2, 1)


def test_a_network_without_heads_has_a_classification_term_of_zero(small, generator):
    made, data = network(small, heads={}), batch(heads={})
    assert made(data, generator)["classification"].item() == 0.0


def test_heads_read_their_own_groups_latents_only(small):
    made = network(small)
    latents = torch.zeros(1, 7, requires_grad=True)
    for name, (group, _) in HEADS.items():
        (gradient,) = torch.autograd.grad(
            made.classify(latents)[name].square().sum() + made.classify(latents)[name].sum(),
            latents,
        )
        reached = torch.zeros(7, dtype=torch.bool)
        reached[made.slices()[group]] = True
        assert torch.equal(gradient[0] != 0, reached)


def test_the_objective_is_the_weighted_sum_of_its_terms(params, small, generator):
    terms = network(small)(batch(), generator)
    train = params.train.model_copy(
        update={
            "kl_weight": KLWeight(technical=2.0, biological=3.0, perturbation=5.0),
            "predictive_weight": 7.0,
            "reference_weight": 11.0,
            "unseen_study_weight": 17.0,
            "partial_metadata_weight": 19.0,
            "classifier_weight": 13.0,
            "free_bits": 0.0,
        }
    )
    kl = {group: terms[f"kl_{group}"].sum() for group in GROUPS}
    for warmup in (0.0, 0.3, 1.0):
        expected = (
            terms["nll_reconstruction"]
            + 7 * terms["nll_predictive"]
            + 11 * terms["nll_reference"]
            + 17 * terms["nll_unseen_study"]
            + 13 * terms["classification"]
            + 19 * terms["kl_partial_metadata"]
            + warmup * (2 * kl["technical"] + 3 * kl["biological"] + 5 * kl["perturbation"])
        )
        torch.testing.assert_close(objective(terms, train, warmup), expected)


def test_free_bits_leave_dimensions_below_them_without_a_pull(params):
    kl = torch.tensor([0.1, 0.4, 2.0], requires_grad=True)
    zero = torch.zeros(())
    others = {"kl_biological": kl.detach(), "kl_perturbation": kl.detach()}
    terms = {
        "nll_reconstruction": zero,
        "nll_predictive": zero,
        "classification": zero,
        "kl_technical": kl,
    } | others
    technical_only = KLWeight(technical=1.0, biological=0.0, perturbation=0.0)
    loss = objective(
        terms, params.train.model_copy(update={"free_bits": 0.5, "kl_weight": technical_only}), 1.0
    )
    torch.testing.assert_close(loss, torch.tensor(0.5 + 0.5 + 2.0))
    loss.backward()
    assert kl.grad.tolist() == [0.0, 0.0, 1.0]


# --- the networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [True, False])
def test_the_decoder_starts_at_the_training_mean_and_the_noise_at_the_training_variance(
    small, linear
):
    torch.manual_seed(0)
    made = build(
        GENES, METADATA_SIZES, HEADS, small.model_copy(update=PLAIN | {"linear_decoder": linear})
    )
    mean, variance = torch.linspace(0, 9, GENES), torch.linspace(0.05, 3, GENES)
    made.start_from(mean + variance.sqrt() * torch.tensor([-1.0, 0.0, 1.0])[:, None])
    torch.testing.assert_close(made.decoder[-1].bias.detach(), mean)
    if linear:
        # The nonlinear part starts silent: latents of zero decode to the mean exactly.
        torch.testing.assert_close(made.decode(torch.zeros(2, 7)).detach(), mean.expand(2, GENES))
    for way in LATENT_SOURCES.values():
        torch.testing.assert_close(made.observation.log_variance(way).detach().exp(), variance)


def test_the_linear_path_adds_a_linear_map_of_the_latents(small, generator):
    made = network(small.model_copy(update=PLAIN | {"linear_decoder": True}))
    latents = torch.randn(5, 7, generator=generator)
    torch.testing.assert_close(
        made.decode(latents) - made.decoder(latents),
        latents @ made.linear_decoder.weight.T,
        rtol=1e-4,
        atol=1e-5,
    )
    assert (
        network(small.model_copy(update=PLAIN | {"linear_decoder": False})).linear_decoder is None
    )


def test_a_fresh_decoder_with_a_linear_path_is_linear(small, generator):
    torch.manual_seed(0)
    made = build(
        GENES, METADATA_SIZES, HEADS, small.model_copy(update=PLAIN | {"linear_decoder": True})
    ).eval()
    first, second = torch.randn(2, 4, 7, generator=generator)
    origin = made.decode(torch.zeros(4, 7))
    torch.testing.assert_close(
        made.decode(first + 2 * second) - origin,
        made.decode(first) - origin + 2 * (made.decode(second) - origin),
        rtol=1e-4,
        atol=1e-5,
    )


def test_latent_log_variances_are_clamped(small):
    made = network(small.model_copy(update=PLAIN))
    with torch.no_grad():
        for net in (made.encoder, *made.priors.values()):
            net[-1].bias.copy_(torch.where(torch.arange(len(net[-1].bias)) % 2 == 0, 1e4, -1e4))
    data = batch()
    for found in (made.posterior(data.expression), made.joint_prior(data.metadata, data.index)):
        assert found.log_variance.min() >= LOG_VARIANCE_RANGE[0]
        assert found.log_variance.max() <= LOG_VARIANCE_RANGE[1]
        assert {found.log_variance.min().item(), found.log_variance.max().item()} == set(
            LOG_VARIANCE_RANGE
        )


def test_observation_variances_respect_their_floor(small):
    made = network(small.model_copy(update={"min_variance": 0.02}))
    with torch.no_grad():
        made.observation.log_variances.copy_(torch.linspace(-50, 50, GENES).expand(4, GENES))
    for way in LATENT_SOURCES.values():
        variance = made.observation.log_variance(way).exp()
        assert variance.min().item() == pytest.approx(0.02, rel=1e-5)
        assert variance.max().item() == pytest.approx(math.exp(LOG_VARIANCE_RANGE[1]), rel=1e-5)


def test_a_variance_that_fell_below_the_floor_can_rise_again(small, generator):
    made, data = network(small), batch()
    with torch.no_grad():
        made.observation.log_variances.fill_(made.observation.min_log_variance - 1.0)
    # The errors of this untrained network are far above the floor: descent must raise every variance.
    terms = made(data, generator)
    sum(terms[name] for name in LATENT_SOURCES).backward()
    assert (made.observation.log_variances.grad < 0).all()


def test_the_posterior_does_not_depend_on_the_other_samples_of_the_batch(small):
    made, data = network(small), batch()
    whole = made.posterior(data.expression)
    for row in range(6):
        torch.testing.assert_close(
            made.posterior(data.expression[row : row + 1]).mean[0],
            whole.mean[row],
            rtol=1e-5,
            atol=1e-6,
        )


def test_distinct_rows_stand_for_all_rows(small, rng):
    matrix = (rng.random((50, 3)) < 0.5).astype(np.float32)
    rows, index = distinct_rows(matrix)
    assert len(rows) == len({tuple(row) for row in matrix.tolist()})
    np.testing.assert_array_equal(rows[index], matrix)
    made = network(small)
    through_distinct = made.prior("technical", torch.from_numpy(rows)).rows(torch.from_numpy(index))
    torch.testing.assert_close(
        through_distinct.mean,
        made.prior("technical", torch.from_numpy(matrix)).mean,
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_group_without_covariates_has_one_prior_for_all_samples(small, generator):
    sizes = {"technical": 0, "biological": 4, "perturbation": 2}
    made = network(small, sizes=sizes)
    rows, index = distinct_rows(np.zeros((6, 0), dtype=np.float32))
    data = batch(sizes=sizes)
    data = replace(
        data,
        metadata=data.metadata | {"technical": torch.from_numpy(rows)},
        index=data.index | {"technical": torch.from_numpy(index)},
    )
    prior = made.joint_prior(data.metadata, data.index)
    assert torch.equal(prior.mean[:, :2], prior.mean[:1, :2].expand(6, 2))
    terms = made(data, generator)
    assert all(torch.isfinite(value).all() for value in terms.values())
    terms["kl_technical"].sum().backward()
    assert any(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in made.priors["technical"].parameters()
    )


def test_conditioning_takes_the_named_groups_from_the_reference(small, generator):
    made = network(small)
    prior, reference = (
        Gaussian(torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator))
        for _ in range(2)
    )
    for groups in ((), ("technical",), ("biological", "perturbation"), GROUPS):
        mixed = made.conditioned(prior, reference, groups)
        for group, place in made.slices().items():
            source = reference if group in groups else prior
            assert torch.equal(mixed.mean[:, place], source.mean[:, place])
            assert torch.equal(mixed.log_variance[:, place], source.log_variance[:, place])


# --- the trained model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gem(params, cohort) -> TrainedGEM:
    """Built on the tiny cohort, not fitted, and in general position: its predictions depend on everything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = MetadataEncoder.fit(
            cohort.rows(["train"]), cohort.declared.covariates, cohort.features
        )
        made = TrainedGEM.build(cohort.genes, encoder, TargetGenes.of(cohort), params.model)
        with torch.no_grad():
            for parameter in made.network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        made.network.eval()
    return made


@pytest.fixture(scope="module")
def queries(cohort) -> pd.DataFrame:
    return cohort.rows(["train"]).head(12)


@pytest.fixture(scope="module")
def references(cohort) -> np.ndarray:
    return cohort.expression(["train"])[20:32]


def test_a_saved_model_predicts_the_same_and_has_the_same_bytes(gem, queries, references, tmp_path):
    gem.save(tmp_path / "first" / "model.pt")
    gem.save(tmp_path / "second.pt")
    assert (tmp_path / "first" / "model.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()
    for place in (tmp_path / "first", tmp_path / "second.pt"):
        loaded = TrainedGEM.load(place)
        assert not loaded.network.training
        np.testing.assert_array_equal(loaded.genes, gem.genes)
        assert loaded.params == gem.params
        np.testing.assert_array_equal(generate(loaded, queries), generate(gem, queries))
        np.testing.assert_array_equal(
            generate(loaded, queries, references), generate(gem, queries, references)
        )
        assert loaded.to_bytes() == gem.to_bytes()


def test_a_model_file_holds_tensors_and_plain_values_only(gem, tmp_path):
    gem.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(content) == {
        "format_version",
        "genes",
        "metadata",
        "targets",
        "model",
        "hidden_study",
        "weights",
        "gene_list_sha256",
        "seen",
        "temperatures",
    }


def test_loading_leaves_the_global_random_state_alone(gem, tmp_path):
    gem.save(tmp_path / "model.pt")
    before = torch.random.get_rng_state()
    TrainedGEM.load(tmp_path / "model.pt")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_absent_model_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="absent"):
        TrainedGEM.load(tmp_path / "model.pt")


def test_another_format_version_is_refused(gem, tmp_path):
    path = tmp_path / "model.pt"
    gem.save(path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format_version": 99}, path)
    with pytest.raises(IntegrityError, match="version 99, expected"):
        TrainedGEM.load(path)
    torch.save([1, 2], path)
    with pytest.raises(IntegrityError, match="version None"):
        TrainedGEM.load(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_model_file_is_refused(gem, tmp_path, share):
    path = tmp_path / "model.pt"
    whole = gem.to_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(IntegrityError, match="not a GEM model file"):
        TrainedGEM.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a text, not a model",
        b"\x80\x02.",
        b"\x80\x04\x95",
        b"PK\x03\x04 and no archive",
        bytes(range(256)),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a GEM model file"):
        TrainedGEM.load(tmp_path / "model.pt")


def test_a_model_file_with_a_flipped_bit_is_refused(gem, tmp_path):
    path, content = tmp_path / "model.pt", bytearray(gem.to_bytes())
    # Inside the largest tensor: the file still opens, and the checksums of the archive tell.
    weights = max(gem.network.state_dict().values(), key=torch.numel).numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 64
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError):
        TrainedGEM.load(path)


class _Trap:
    """Pickles to a call that makes a file: code that must not run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, writer):
    path, trace = tmp_path / "model.pt", tmp_path / "ran"
    content = {"format_version": 1, "weights": _Trap(trace)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(IntegrityError, match="not a GEM model file"):
        TrainedGEM.load(path)
    assert not trace.exists()


def test_weights_that_do_not_fit_the_configuration_are_refused(gem, tmp_path):
    path = tmp_path / "model.pt"
    gem.save(path)
    content = torch.load(path, weights_only=True)
    content["model"]["hidden"] += 1
    torch.save(content, path)
    with pytest.raises(IntegrityError, match="do not fit"):
        TrainedGEM.load(path)


def test_other_genes_are_refused_with_the_difference(gem):
    gem.require_genes(gem.genes.copy())
    with pytest.raises(IntegrityError, match=f"1 missing .*{gem.genes[0]}.*1 unknown .*stranger"):
        gem.require_genes(np.array([*gem.genes[1:], "stranger"]))
    with pytest.raises(IntegrityError, match=r"0 missing.*0 unknown.*in another order"):
        gem.require_genes(gem.genes[::-1])


def test_the_mean_prediction_is_deterministic_and_row_by_row(gem, queries, references):
    for reference in (None, references):
        mean = generate(gem, queries, reference)
        assert mean.shape == (12, len(gem.genes))
        np.testing.assert_array_equal(mean, generate(gem, queries, reference))
        part = None if reference is None else reference[3:7]
        np.testing.assert_allclose(
            generate(gem, queries.iloc[3:7], part), mean[3:7], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("which", [("latents",), ("noise",), ("latents", "noise")])
def test_the_same_seed_gives_the_same_draws_and_another_seed_others(gem, queries, which):
    draws = [
        generate(gem, queries, **dict.fromkeys(which, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).all()


def test_generation_never_touches_the_global_random_state(gem, queries, references):
    before = torch.random.get_rng_state()
    generate(gem, queries)
    generate(
        gem,
        queries,
        references,
        latents=torch.Generator().manual_seed(0),
        noise=torch.Generator().manual_seed(0),
    )
    gem.expect(gem.query(queries), draws=3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(77)
    again = generate(gem, queries, latents=torch.Generator().manual_seed(4))
    torch.manual_seed(78)
    np.testing.assert_array_equal(
        again, generate(gem, queries, latents=torch.Generator().manual_seed(4))
    )


@pytest.mark.parametrize(("conditioned", "way"), [(False, PRIOR), (True, REFERENCE_SAMPLE)])
def test_drawn_noise_has_the_variance_of_its_way_of_prediction(
    gem, queries, references, conditioned, way
):
    table, reference = (
        pd.concat([queries] * 400),
        np.concatenate([references] * 400) if conditioned else None,
    )
    noise = generate(gem, table, reference, noise=torch.Generator().manual_seed(0)) - generate(
        gem, table, reference
    )
    expected = gem.network.observation.log_variance(way).detach().exp().numpy()
    ratio = noise.var(axis=0) / expected
    np.testing.assert_allclose(ratio, 1, atol=5 * math.sqrt(2 / len(table)))
    np.testing.assert_allclose(
        noise.mean(axis=0) / np.sqrt(expected), 0, atol=5 / math.sqrt(len(table))
    )


def test_the_expectation_is_the_mean_of_draws_of_the_latents(gem, queries):
    query = gem.query(queries)
    found = gem.expect(query, draws=400, seed=3)
    generator = torch.Generator().manual_seed(9)
    draws = np.stack([generate(gem, queries, latents=generator) for _ in range(400)]).astype(
        np.float64
    )
    error = draws.std(axis=0) * math.sqrt(2 / 400)
    assert (np.abs(found - draws.mean(axis=0)) < 5 * error + 1e-5).all()
    np.testing.assert_array_equal(found, gem.expect(query, draws=400, seed=3))


def test_an_unknown_conditioning_group_is_refused(gem, queries, references):
    with pytest.raises(InputError, match=r"biologcal.*known: technical, biological, perturbation"):
        generate(gem, queries, references, ("technical", "biologcal"))


def test_conditioning_on_every_group_ignores_the_metadata(gem, queries, references):
    # What a perturbation does to its own gene is no latent: of samples whose perturbation has no target.
    queries = queries.assign(perturbation="control")
    shuffled = queries.iloc[::-1]
    np.testing.assert_array_equal(
        generate(gem, queries, references, GROUPS), generate(gem, shuffled, references, GROUPS)
    )
    assert not np.array_equal(generate(gem, queries), generate(gem, shuffled))


def test_conditioning_on_no_group_ignores_the_reference(gem, queries, references):
    np.testing.assert_array_equal(generate(gem, queries, references, ()), generate(gem, queries))


def test_only_the_perturbation_of_the_query_counts_under_the_default_conditioning(
    gem, queries, references
):
    same_perturbation = queries.copy()
    for name in ("study", "tissue", "cell_type", "sex", "age_years"):
        same_perturbation[name] = None
    np.testing.assert_array_equal(
        generate(gem, queries, references), generate(gem, same_perturbation, references)
    )


def test_unknown_metadata_is_refused_unless_asked_for(gem, queries):
    strange = queries.assign(perturbation="never seen")
    with pytest.raises(InputError, match="never seen"):
        generate(gem, strange)
    missing = generate(gem, queries.assign(perturbation=None))
    np.testing.assert_array_equal(generate(gem, strange, unknown="missing"), missing)


# --- the predictive likelihood --------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_predictive_log_likelihood_is_the_log_of_the_mean_likelihood_over_draws(
    gem, queries, references
):
    expression, query, network_ = torch.from_numpy(references), gem.query(queries), gem.network
    draws = 6
    found, mean = predictive_log_likelihood(
        network_, Observed(expression), query, draws, torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(1)
    deviation = torch.exp(0.5 * network_.observation.log_variance(PRIOR)).double()
    per_draw, decoded_draws = [], []
    for _ in range(draws):
        prior = query.latents
        latents = prior.mean + torch.exp(0.5 * prior.log_variance) * torch.randn(
            prior.mean.shape, generator=generator
        )
        decoded = decode(network_, query, latents)
        decoded_draws.append(decoded)
        per_draw.append(
            Normal(decoded.double(), deviation).log_prob(expression.double()).sum(dim=1).tolist()
        )
    for sample in range(len(expression)):
        values = [draw[sample] for draw in per_draw]
        highest = max(values)
        expected = highest + math.log(sum(math.exp(value - highest) for value in values) / draws)
        assert float(found[sample]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(mean, torch.stack(decoded_draws).mean(dim=0))


@torch.no_grad()
def test_the_predictive_log_likelihood_of_one_draw_is_the_normal_density(gem, queries, references):
    expression, query = torch.from_numpy(references), gem.query(queries)
    found, mean = predictive_log_likelihood(
        gem.network, Observed(expression), query, 1, torch.Generator().manual_seed(1)
    )
    density = Normal(mean, torch.exp(0.5 * gem.network.observation.log_variance(PRIOR)))
    torch.testing.assert_close(found, density.log_prob(expression).sum(dim=1), rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_more_draws_never_lower_the_predictive_log_likelihood_in_expectation(
    gem, queries, references
):
    # Jensen: the log of a mean of K draws grows with K towards the marginal likelihood.
    expression, query = torch.from_numpy(references), gem.query(queries)

    def score(draws):
        seeds = (torch.Generator().manual_seed(seed) for seed in range(20))
        return float(
            torch.stack(
                [
                    predictive_log_likelihood(
                        gem.network, Observed(expression), query, draws, seed
                    )[0]
                    for seed in seeds
                ]
            ).mean()
        )

    scores = [score(draws) for draws in (1, 4, 16)]
    assert scores[0] < scores[1] < scores[2]
