"""Masked metadata fields and simulated batch effects."""

import pytest
import torch

from pipeline.gem.training.masking import dropout_fields, mask_fields, simulate_batch_effects


def test_dropout_masks_whole_fields_at_its_rate(generator):
    masked = dropout_fields(torch.ones(4000, 5), [(2, 0), (3, 0)], 0.3, 0.0, generator)
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert torch.equal(masked[:, 2], masked[:, 4])
    assert float((masked[:, [0, 2]] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_identity_dropout_masks_the_identity_and_keeps_the_features(generator):
    """A field of 2 features and 3 levels, and one without levels."""
    masked = dropout_fields(torch.ones(4000, 6), [(2, 3), (1, 0)], 0.0, 0.3, generator)
    assert (masked[:, [0, 1, 5]] == 1).all()
    assert torch.equal(masked[:, 2], masked[:, 3]) and torch.equal(masked[:, 2], masked[:, 4])
    assert float((masked[:, 2] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_masked_field_has_no_identity_and_the_two_rates_are_independent(generator):
    masked = dropout_fields(torch.ones(20000, 2), [(1, 1)], 0.4, 0.5, generator)
    features, identity = masked[:, 0] == 1, masked[:, 1] == 1
    assert float(features.float().mean()) == pytest.approx(0.6, abs=0.02)
    assert float(identity.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not (identity & ~features).any()


@pytest.mark.parametrize(
    ("blocks", "field_rate", "identity_rate"),
    [([(2, 3)], 0.0, 0.0), ([(5, 0)], 0.0, 0.9), ([], 0.5, 0.5)],
)
def test_without_anything_to_mask_no_random_number_is_drawn(
    generator, blocks, field_rate, identity_rate
):
    metadata = torch.ones(7, sum(map(sum, blocks)))
    state = generator.get_state()
    assert dropout_fields(metadata, blocks, field_rate, identity_rate, generator) is metadata
    assert torch.equal(generator.get_state(), state)


def test_mask_fields_masks_whole_fields_and_every_number_of_them_equally_often(generator):
    blocks = [(2, 0), (1, 3), (1, 0)]
    masked = mask_fields(torch.ones(3000, 7), blocks, generator)
    fields = [part.min(dim=1).values for part in masked.split([2, 4, 1], dim=1)]
    by_field = torch.stack(fields, dim=1)
    assert torch.equal(masked, by_field.repeat_interleave(torch.tensor([2, 4, 1]), dim=1))
    shares = torch.bincount(by_field.sum(dim=1).long(), minlength=4) / 3000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)


def test_mask_fields_accepts_a_group_without_fields(generator):
    assert mask_fields(torch.zeros(4, 0), [], generator).shape == (4, 0)


def test_batch_effects_have_the_requested_share_and_the_spread_of_studies(generator):
    spread = torch.rand(60, generator=generator) + 0.1
    effects = simulate_batch_effects(4000, 0.4, spread, generator)
    nonzero = effects.abs().sum(dim=1) > 0
    assert float(nonzero.float().mean()) == pytest.approx(0.4, abs=0.03)
    # A uniform factor from 0 to 1.5 has a mean square of 0.75.
    ratio = effects[nonzero].square().mean(dim=0) / spread.square()
    assert float(ratio.mean()) == pytest.approx(0.75, rel=0.1)
    assert (simulate_batch_effects(50, 0.0, spread, generator) == 0).all()
