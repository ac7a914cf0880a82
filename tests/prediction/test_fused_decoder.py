"""The fused decoder equals the network's, for all forms of the network and of the query."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.settings import ROOT

from pipeline.gem.common.config import Covariates, read_params
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.query import TargetGenes, decode
from pipeline.gem.prediction import fused_decoder
from pipeline.gem.prediction.fused_decoder import FusedDecoder, MeanDecoder

GENES, ROWS = 40, 200
COVARIATES = {
    "technical": {"study": {"kind": "categorical"}},
    "biological": {"tissue": {"kind": "categorical"}},
    "perturbation": {
        "perturbation": {"kind": "categorical"},
        "dose": {"kind": "numeric", "scale": "linear"},
    },
}
SIZES = {"latent.technical": 3, "latent.biological": 5, "latent.perturbation": 4, "hidden": 32}
NETWORKS = [
    {},
    {"observation": "negative_binomial"},
    {"observation": "multinomial"},
    {"blocks": 2},
    {"hidden": 8},  # narrower than its inputs: not fused
    {"interactions": 0},
    {"additive_technical": False},
    {"additive_technical": False, "linear_decoder": False},
    {"additive_technical": False, "linear_decoder": False, "interactions": 0, "blocks": 1},
]
ALL_NETWORKS = pytest.mark.parametrize("changes", NETWORKS, ids=str)


def random_query(doses: int = 2) -> pd.DataFrame:
    rng, levels = np.random.default_rng(0), {"study": 4, "tissue": 3, "perturbation": 5}
    columns = {
        name: [f"{name}_{level}" for level in rng.integers(0, size, ROWS)]
        for name, size in levels.items()
    }
    return pd.DataFrame(columns).assign(dose=rng.integers(1, doses + 1, ROWS))


def random_model(samples: pd.DataFrame, **changes: object) -> TrainedGEM:
    """A GEM of which no weight is zero or one; all perturbations but one have a target gene."""
    values = {f"model.{name}": value for name, value in (SIZES | changes).items()}
    values = {"model.observation": "normal"} | values
    encoder = MetadataEncoder.fit(samples, Covariates.model_validate(COVARIATES))
    genes = {f"perturbation_{level}": (level, 0) for level in range(1, 5)}
    targets = TargetGenes("perturbation", genes, sets=False)
    params = read_params(ROOT / "params.yaml").override(values).model
    torch.manual_seed(1)
    gem = TrainedGEM.build(np.arange(GENES).astype(str), encoder, targets, params)
    for weight in gem.network.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    gem.network.eval()
    return gem


def assert_equal_but_for_rounding(decoded: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(decoded.to(expected), expected, rtol=1e-5, atol=tolerance)


@ALL_NETWORKS
@torch.no_grad()
def test_fused_weights_decode_any_latents_as_the_network_does(changes):
    network, latents = random_model(random_query(), **changes).network, torch.randn(30, 12) * 2
    decoded = FusedDecoder(network).decode(latents)
    assert_equal_but_for_rounding(decoded, network.double().decode(latents.double()))


@ALL_NETWORKS
@pytest.mark.parametrize(("doses", "repeats"), [(2, True), (1000, False)])
@torch.no_grad()
def test_means_are_those_of_the_network_whether_metadata_repeat_or_not(changes, doses, repeats):
    samples = random_query(doses)
    gem = random_model(samples, **changes)
    query = gem.decoder_input(samples)
    decoder = MeanDecoder(FusedDecoder(gem.network), query)
    assert (decoder.table is not None) == (repeats and changes.get("linear_decoder", True))
    rows = torch.tensor([3, 199, 3, 0, 77])
    inputs = query.rows(rows)
    assert (inputs.target_gene >= 0).unique().tolist() == [False, True]
    expected = decode(gem.network, inputs, inputs.latents.mean)
    assert_equal_but_for_rounding(decoder.decode(rows), expected)


@torch.no_grad()
def test_means_from_references_are_those_of_the_network_and_need_no_table():
    samples = random_query()
    gem = random_model(samples)
    expression = np.random.default_rng(1).uniform(0, 8, (2, GENES)).astype(np.float32)
    query = gem.decoder_input(samples, expression, reference_index=np.arange(ROWS) % 2)
    decoder = MeanDecoder(FusedDecoder(gem.network), query)
    assert decoder.table is None and query.reference_residual.abs().min() > 0
    expected = decode(gem.network, query, query.latents.mean)
    assert_equal_but_for_rounding(decoder.decode(torch.arange(ROWS)), expected)


def test_a_table_that_would_be_too_large_is_not_built(monkeypatch):
    samples = random_query()
    gem = random_model(samples)
    monkeypatch.setattr(fused_decoder, "_MAX_TABLE_VALUES", GENES)
    assert MeanDecoder(FusedDecoder(gem.network), gem.decoder_input(samples)).table is None
