"""Sparse metadata against dense matrices: rows, the first layer and its gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import dense, levels, sparse

from pipeline.gem.common.config import Embedding
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.encoder import field_columns
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.model.metadata.layers import LinearPrior, MetadataLinear, TargetEffect
from pipeline.gem.model.metadata.rows import MetadataRows

assert_close = torch.testing.assert_close


@pytest.fixture
def fields(rng) -> list[CovariateEncoder]:
    """Five levels; two levels and six labels with four features; three features alone."""

    def embedding(name: str, number: int, labels: int, size: int) -> CovariateEncoder:
        names = tuple(f"label{label}" for label in range(labels))
        table = FeatureTable(names, rng.normal(size=(labels, size)).astype(np.float32))
        declared = Embedding(kind="embedding", table="table.csv")
        return CovariateEncoder(name, declared, names[:number], features=table)

    return [levels("type", 5), embedding("drug", 2, 6, 4), embedding("gene", 0, 3, 3)]


def random_rows(generator, rows: int, columns: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=generator)
    return values * (torch.rand(rows, columns, generator=generator) < 0.4)


def written_out(fields, matrix: torch.Tensor) -> torch.Tensor:
    """(U, inputs) own columns of all covariates, then the sum of the features of each."""
    parts, columns = [], field_columns(fields)
    parts += [matrix[:, part.own] for part in columns]
    for part in columns:
        if part.field.features:
            parts.append(matrix[:, part.features] @ torch.from_numpy(part.field.features.values))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("layer_class", [MetadataLinear, LinearPrior])
def test_the_sparse_layer_is_the_dense_product_and_so_are_its_gradients(
    fields, layer_class, generator
):
    matrix = random_rows(generator, 8, 5 + 2 + 6 + 3)
    layer = layer_class(fields, 3)
    weights = torch.cat([layer.weight, *layer.feature_weights]).detach().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    gain = LinearPrior.GAIN if layer_class is LinearPrior else 1.0
    inputs = gain * written_out(fields, matrix)
    assert inputs.shape[1] == len(weights) == sum(field.inputs for field in fields)
    output, expected = layer(sparse(matrix)), F.linear(inputs, weights.t(), bias)
    assert_close(output, expected, rtol=1e-6, atol=1e-6)
    factors = torch.randn(8, 3, generator=generator)
    (output * factors).sum().backward()
    (expected * factors).sum().backward()
    gradients = torch.cat([layer.weight.grad, *(weight.grad for weight in layer.feature_weights)])
    assert_close(gradients, weights.grad, rtol=1e-6, atol=1e-6)
    assert_close(layer.bias.grad, bias.grad, rtol=1e-6, atol=1e-6)


def test_the_layer_starts_with_the_distribution_of_a_dense_one(fields):
    """Uniform within the inverse root of the number of inputs."""
    torch.manual_seed(0)
    layer, other = MetadataLinear(fields, 2000), torch.nn.Linear(14, 2000)
    weights = torch.cat([layer.weight, *layer.feature_weights])
    for values in (weights, other.weight):
        assert values.abs().max() <= 14**-0.5
        assert values.std().item() == pytest.approx((14 * 3) ** -0.5, rel=0.02)
    assert layer.bias.abs().max() <= 14**-0.5 and layer.bias.std() > 0.9 * (14 * 3) ** -0.5


def test_a_layer_without_covariates_has_the_same_output_for_all_rows():
    layer = MetadataLinear([], 4)
    output = layer(sparse(torch.zeros(3, 0)))
    assert torch.equal(output, layer.bias.expand(3, 4))


@pytest.mark.parametrize("index", [[], [3], [2, 0, 2, 4], [1, 1]])
def test_rows_are_chosen_by_index(generator, index):
    matrix = random_rows(generator, 5, 7)
    matrix[1] = 0  # a row without entries
    rows = sparse(matrix)[torch.tensor(index, dtype=torch.long)]
    assert len(rows) == len(index)
    assert torch.equal(dense(rows, 7), matrix[index])


def test_rows_of_different_widths_are_joined_and_written_as_a_sparse_matrix(generator):
    matrix = random_rows(generator, 5, 7)
    wide, narrow = sparse(matrix), sparse(matrix[:, :1])
    assert wide.width > narrow.width
    joined = MetadataRows.join([wide, narrow])
    expected = torch.cat([matrix, F.pad(matrix[:, :1], (0, 6))])
    assert torch.equal(dense(joined, 7), expected)
    written = joined.to_sparse(7)
    assert torch.equal(torch.from_numpy(written.toarray()), expected)
    assert written.nnz == (expected != 0).sum()
    assert torch.equal(joined.offsets, joined.width * torch.arange(11))


def test_the_target_effect_reads_the_columns_of_the_intervention_alone(fields, generator):
    """A dense perceptron of the first five columns, which here are the intervention's."""
    matrix = random_rows(generator, 8, 16)
    effect = TargetEffect(fields, [True] * 5 + [False] * 11)
    torch.nn.init.normal_(effect.narrow.weight, generator=generator)
    hidden = F.relu(matrix[:, :5] @ effect.widen.weight[:5] + effect.widen.bias)
    expected = F.linear(hidden, effect.narrow.weight, effect.narrow.bias).squeeze(1)
    assert_close(effect(sparse(matrix)), expected, rtol=1e-6, atol=1e-6)
    assert len(TargetEffect([], [])(sparse(torch.zeros(3, 0)))) == 3


def test_no_rows_are_no_rows(generator):
    none = sparse(random_rows(generator, 5, 7)).none()
    assert len(none) == 0 and len(none.values) == 0 and len(none.row()) == 0
