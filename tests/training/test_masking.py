"""Masked metadata fields and simulated batch effects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.networks import dense, levels, sparse

from pipeline.gem.data.encoder import FieldColumns, field_columns
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.training.masking import (
    Fields,
    dropout_fields,
    mask_fields,
    simulate_batch_effects,
)


def fields_of(*sizes: int, features: int = 0) -> tuple[list[FieldColumns], Fields]:
    """Categorical fields with so many levels; the first has `features` labels with features."""
    encoders = [levels(f"field{number}", size) for number, size in enumerate(sizes)]
    if features:
        labels = tuple(f"{label:06}" for label in range(features))
        table = FeatureTable(labels, np.ones((features, 3), dtype=np.float32))
        encoders[0] = replace(encoders[0], features=table)
    columns = field_columns(encoders)
    return columns, Fields.of(columns, torch.device("cpu"))


def full_rows(rows: int, columns: int) -> MetadataRows:
    return sparse(torch.ones(rows, columns))


def test_dropout_masks_whole_fields_at_its_rate(generator):
    _, fields = fields_of(2, 3)
    masked = dense(dropout_fields(full_rows(4000, 5), fields, 0.3, 0.0, generator), 5)
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert torch.equal(masked[:, 2], masked[:, 4])
    assert float((masked[:, [0, 2]] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_identity_dropout_masks_the_identity_and_keeps_the_features(generator):
    """A field of 3 levels and 2 labels with features, and one without features."""
    (first, second), fields = fields_of(3, 1, features=2)
    masked = dense(dropout_fields(full_rows(4000, 6), fields, 0.0, 0.3, generator), 6)
    assert (masked[:, first.features] == 1).all() and (masked[:, second.own] == 1).all()
    identity = masked[:, first.own]
    assert torch.equal(identity, identity[:, :1].expand(4000, 3))
    assert float((identity[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_masked_field_has_no_identity_and_the_two_rates_are_independent(generator):
    (field,), fields = fields_of(1, features=1)
    masked = dense(dropout_fields(full_rows(20000, 2), fields, 0.4, 0.5, generator), 2)
    features, identity = masked[:, field.features] == 1, masked[:, field.own] == 1
    assert float(features.float().mean()) == pytest.approx(0.6, abs=0.02)
    assert float(identity.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not (identity & ~features).any()


@pytest.mark.parametrize(
    ("sizes", "features", "field_rate", "identity_rate"),
    [((5,), 2, 0.0, 0.0), ((5,), 0, 0.0, 0.9), ((), 0, 0.5, 0.5)],
)
def test_without_anything_to_mask_no_random_number_is_drawn(
    generator, sizes, features, field_rate, identity_rate
):
    metadata = full_rows(7, sum(sizes) + features)
    state = generator.get_state()
    _, fields = fields_of(*sizes, features=features)
    assert dropout_fields(metadata, fields, field_rate, identity_rate, generator) is metadata
    assert torch.equal(generator.get_state(), state)


def test_mask_fields_masks_whole_fields_and_every_number_of_them_equally_often(generator):
    columns, fields = fields_of(2, 3, 1, features=1)
    masked = dense(mask_fields(full_rows(3000, 7), fields, generator), 7)
    parts = [torch.cat([masked[:, part.own], masked[:, part.features]], 1) for part in columns]
    by_field = torch.stack([part[:, 0] for part in parts], dim=1)
    for position, part in enumerate(parts):
        assert torch.equal(part, by_field[:, [position]].expand_as(part))
    shares = torch.bincount(by_field.sum(dim=1).long(), minlength=4) / 3000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)


@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_groups_without_fields_and_without_a_value_in_training_are_masked(generator, sizes):
    _, fields = fields_of(*sizes)
    assert len(mask_fields(full_rows(4, 0), fields, generator)) == 4
    assert len(dropout_fields(full_rows(4, 0), fields, 0.5, 0.0, generator)) == 4


def test_batch_effects_have_the_requested_share_and_the_spread_of_studies(generator):
    spread = torch.rand(60, generator=generator) + 0.1
    effects = simulate_batch_effects(4000, 0.4, spread, generator)
    nonzero = effects.abs().sum(dim=1) > 0
    assert float(nonzero.float().mean()) == pytest.approx(0.4, abs=0.03)
    # A uniform factor from 0 to 1.5 has a mean square of 0.75.
    ratio = effects[nonzero].square().mean(dim=0) / spread.square()
    assert float(ratio.mean()) == pytest.approx(0.75, rel=0.1)
    assert (simulate_batch_effects(50, 0.0, spread, generator) == 0).all()
