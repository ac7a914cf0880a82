"""The decoder of predictions: one product, and a table of what distinct metadata add, say what the network says."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.settings import ROOT

from pipeline.gem.common.config import Covariates, read_params
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.gem import TargetGenes, TrainedGEM, decode
from pipeline.gem.prediction.fused_decoder import FoldedDecoder, Means

GENES = 40
COVARIATES = {
    "technical": {"study": {"kind": "categorical"}},
    "biological": {"tissue": {"kind": "categorical"}},
    "perturbation": {
        "perturbation": {"kind": "categorical"},
        "dose": {"kind": "numeric", "scale": "linear"},
    },
}
SHAPES = [
    {},
    {"blocks": 2},
    {"hidden": 8},  # narrower than its inputs: not folded
    {"interactions": 0},
    {"additive_technical": False},
    {"additive_technical": False, "linear_decoder": False},
    {"additive_technical": False, "linear_decoder": False, "interactions": 0, "blocks": 1},
]


def asked(rows: int, doses: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    named = {
        name: [f"{name}_{value}" for value in rng.integers(0, number, rows)]
        for name, number in (("study", 4), ("tissue", 3), ("perturbation", 5))
    }
    return pd.DataFrame(named).assign(dose=rng.integers(1, doses + 1, rows))


def built(changes: dict[str, object], samples: pd.DataFrame) -> TrainedGEM:
    """A GEM none of whose weights is zero or one."""
    latent = {"latent.technical": 3, "latent.biological": 5, "latent.perturbation": 4, "hidden": 32}
    params = (
        read_params(ROOT / "params.yaml")
        .override({f"model.{name}": value for name, value in (latent | changes).items()})
        .model
    )
    torch.manual_seed(1)
    encoder = MetadataEncoder.fit(samples, Covariates.model_validate(COVARIATES))
    gem = TrainedGEM.build(
        np.array([f"G{gene}" for gene in range(GENES)]),
        encoder,
        TargetGenes("perturbation", {"perturbation_1": 7}),
        params,
    )
    for weight in gem.network.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    gem.network.eval()
    return gem


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_the_product_says_what_the_network_says(changes):
    gem = built(changes, asked(50, 2))
    latents = torch.randn(30, 12) * 2
    said, wanted = (
        FoldedDecoder(gem.network).decode(latents),
        gem.network.double().decode(latents.double()),
    )
    torch.testing.assert_close(
        said.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("doses", [2, 1000])
@torch.no_grad()
def test_means_are_those_of_the_network_whether_metadata_repeat_or_not(changes, doses):
    samples = asked(200, doses)
    gem = built(changes, samples)
    query = gem.query(samples)
    means = Means.of(FoldedDecoder(gem.network), query)
    assert (means.table is not None) == (doses == 2 and changes.get("linear_decoder", True))
    rows = torch.tensor([3, 199, 3, 0, 77])
    wanted = decode(gem.network, query.rows(rows), query.latents.mean[rows])
    torch.testing.assert_close(
        means(rows), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )


@torch.no_grad()
def test_a_query_from_references_has_no_table_and_says_the_same():
    samples = asked(200, 2)
    gem = built({}, samples)
    expression = np.random.default_rng(1).uniform(0, 8, (2, GENES)).astype(np.float32)
    query = gem.query(samples, expression, chosen=np.arange(200) % 2)
    means, rows = Means.of(FoldedDecoder(gem.network), query), torch.arange(200)
    assert means.table is None
    wanted = decode(gem.network, query, query.latents.mean)
    torch.testing.assert_close(
        means(rows), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )


def test_a_table_that_would_not_fit_in_memory_is_not_made(monkeypatch):
    samples = asked(200, 2)
    gem = built({}, samples)
    monkeypatch.setattr("pipeline.gem.prediction.fused_decoder._TABLE_VALUES", GENES)
    assert Means.of(FoldedDecoder(gem.network), gem.query(samples)).table is None
