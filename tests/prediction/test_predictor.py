"""Predictions: means, draws, intervals, ensembles, references and extrapolation."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.generation import counts_from_log_cpm, generate

from pipeline.gem import GEM
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.splits import VISIBLE
from pipeline.gem.prediction import predictor
from pipeline.gem.prediction.predictor import Predictor, Request
from pipeline.gem.prediction.query_table import QueryFrame


def predicted(gem: GEM, query: pd.DataFrame, **options) -> np.ndarray:
    """(N, G) counts."""
    return gem.predict(query, **options)[gem.genes].to_numpy()


@pytest.mark.parametrize("total", [1_000, 1_000_000, 2**31 - 1])
def test_the_mean_is_decoded_at_the_mean_of_the_latents_and_sums_to_the_total(gem, query, total):
    counts = predicted(gem, query, total_count=total)
    assert counts.dtype == np.int32 and counts.min() >= 0
    assert (counts.sum(axis=1, dtype=np.int64) == total).all()
    expected = counts_from_log_cpm(generate(gem, query), np.full(len(query), total))
    np.testing.assert_allclose(counts.astype(np.int64), expected, rtol=2e-5, atol=1)


def test_predictions_depend_neither_on_blocks_nor_on_repeated_rows(gem, query, monkeypatch):
    mirrored = pd.concat([query, query.iloc[::-1]], ignore_index=True)
    one_block = predicted(gem, mirrored)
    np.testing.assert_array_equal(one_block[:40], one_block[:39:-1])
    monkeypatch.setattr(predictor, "QUERY_ROWS", 13)
    monkeypatch.setattr(predictor, "BLOCK_VALUES", 5 * len(gem.genes))
    blocks = list(Predictor([gem], Request()).blocks(QueryFrame.of(mirrored)))
    assert len(blocks) > 10
    assert [row for block in blocks for row in block.row] == list(range(80))
    counts = np.concatenate([block.counts for block in blocks])
    assert np.abs(counts - one_block).max() <= 2  # matrix products of other shapes round otherwise


def test_draws_repeat_with_their_seed_and_vary_around_the_mean(gem, query):
    def draw(**options) -> pd.DataFrame:
        return gem.predict(query.head(3), mode="sample", draws=200, **options)

    first = draw()
    assert first["draw"].tolist() == list(range(1, 201)) * 3
    assert (first[gem.genes].sum(axis=1) == 1_000_000).all()
    pd.testing.assert_frame_equal(first, draw(seed=0))
    assert (first[gem.genes] != draw(seed=1)[gem.genes]).any(axis=1).all()
    logs = np.log1p(first[gem.genes].to_numpy()).reshape(3, 200, -1)
    gap = logs.mean(axis=1) - np.log1p(predicted(gem, query.head(3)))
    # Noise takes the same share of the total from every gene.
    centred = gap - np.median(gap, axis=1, keepdims=True)
    assert np.median(np.abs(centred)) < 0.15 < np.median(logs.std(axis=1))
    noise = np.log1p(draw(deterministic_latents=True)[gem.genes].to_numpy()).reshape(3, 200, -1)
    assert noise.var(axis=1).mean() < logs.var(axis=1).mean()


@pytest.mark.parametrize(
    ("mode", "public_name"), [("mean", "mean estimation"), ("sample", "sample generation")]
)
def test_the_mode_names_of_the_public_api_are_accepted(gem, query, mode, public_name):
    np.testing.assert_array_equal(
        predicted(gem, query, mode=mode), predicted(gem, query, mode=public_name)
    )


def test_the_interval_covers_nine_of_ten_further_draws(gem, query):
    interval = gem.predict(query.head(4), interval=True)
    draws = predicted(gem, query.head(4), mode="sample", draws=300, seed=5).reshape(4, 300, -1)
    low, high = (np.stack(interval[name])[:, None] for name in ("low", "high"))
    assert ((draws >= low) & (draws <= high)).mean() == pytest.approx(0.9, abs=0.03)


def test_an_ensemble_predicts_the_mean_log_cpm_of_its_models(model_directory, query):
    models, _ = GEM.load_seeds(model_directory)
    totals = np.full(len(query), 10**6)
    blocks = Predictor(models, Request()).blocks(QueryFrame.of(query))
    counts = np.concatenate([block.counts for block in blocks])
    of_models = [
        log_cpm(counts_from_log_cpm(generate(model, query), totals), totals) for model in models
    ]
    expected = counts_from_log_cpm(np.mean(of_models, axis=0), totals)
    np.testing.assert_allclose(counts, expected, rtol=0.01, atol=2)
    with pytest.raises(InputError, match="no latents in common"):
        Predictor(models, Request(latents=True))


def test_latents_are_the_means_of_the_prior(gem, query):
    predictions, means = gem.predict(query, latents=True), gem.decoder_input(query).latents.mean
    for group, columns in gem.network.slices().items():
        latents = np.stack(predictions[f"latent_{group}"])
        np.testing.assert_allclose(latents, means[:, columns].numpy(), atol=1e-5)


def test_a_combination_outside_the_training_split_is_extrapolated_and_missing_values_match_any(
    gem, cohort
):
    train = cohort.rows(VISIBLE)  # of the refit
    contexts = set(zip(train["tissue"], train["cell_type"], strict=True))
    trained = set(zip(train["tissue"], train["cell_type"], train["perturbation"], strict=True))
    held_out = cohort.rows(["test_combination"])[["tissue", "cell_type", "perturbation"]]
    tissue, cell_type, new_drug = held_out.iloc[0]
    assert (tissue, cell_type, new_drug) not in trained
    other_cell = next(
        cell for cell in train["cell_type"].unique() if (tissue, cell) not in contexts
    )
    rows = {
        (tissue, cell_type, "control"): False,
        (tissue, cell_type, None): False,
        (tissue, other_cell, None): True,
        (tissue, cell_type, new_drug): True,
        (None, None, new_drug): False,
        (None, None, "?"): True,
    }
    query = pd.DataFrame([*rows], columns=["tissue", "cell_type", "perturbation"])
    predictions = gem.predict(query, unknown="missing")
    assert predictions["extrapolated"].tolist() == list(rows.values())


def test_a_single_reference_is_that_of_all_rows(gem, query, reference):
    named = query.head(3).assign(reference_id=reference.index[0])
    np.testing.assert_array_equal(
        predicted(gem, query.head(3), reference=reference.head(1)),
        predicted(gem, named, reference=reference),
    )


def test_conditioning_on_no_group_predicts_from_metadata(gem, query, reference):
    np.testing.assert_array_equal(
        predicted(gem, query, reference=reference.head(1), conditioning=()), predicted(gem, query)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "median"}, "mode: 'median' is unknown"),
        ({"draws": 3}, "draws: 3 in mode mean"),
        ({"mode": "sample", "interval": True}, "interval"),
        ({"total_count": 0}, "total_count: 0; expected 1 to"),
        ({"conditioning": ("biologicl",)}, "did you mean biological"),
        ({"unknown": "skip"}, "expected refuse or missing"),
    ],
)
def test_an_invalid_request_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Request(**options)


@pytest.mark.parametrize("observation", ["negative_binomial", "multinomial"])
def test_count_models_predict_means_and_draws(cohort, params, query, observation):
    from pipeline.gem.training.dataset import TrainingData
    from pipeline.gem.training.trainer import fit

    changed = params.override({"model.observation": observation, "train.epochs": 1})
    data = TrainingData.load(cohort, torch.device("cpu"), with_counts=True)
    gem = GEM(**vars(fit(data, changed, seed=1).gem))
    assert (predicted(gem, query).sum(axis=1) == 10**6).all()
    draws = predicted(gem, query, mode="sample", total_count=5000)
    assert draws.sum(axis=1).mean() == pytest.approx(5000, rel=0.1)


def test_a_prediction_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        predictor.whole_counts(torch.tensor([[0.5, 0.5], [torch.nan, 0.5]]), 10)
