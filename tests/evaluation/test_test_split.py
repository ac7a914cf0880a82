"""What a split looks like, recomputed from the cohort's tables by plain loops."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import World, world_of

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.test_split import EvaluationSplits

CONTEXT = ["tissue", "cell_type"]
SPLITS = ["test_random", "test_combination", "test_perturbation", "test_study"]


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


def texts(samples: pd.DataFrame, columns: list[str]) -> list[tuple]:
    return [
        tuple("?" if pd.isna(value) else str(value) for value in row)
        for row in samples[columns].to_numpy(dtype=object)
    ]


def hidden_of(world: World, split: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Controls of the observed side: reserved ones; of a new study, its own that are scored."""
    scene = world.by_split[split][0]
    if split != "test_study":
        return world.cohort.rows(["test_control"]), world.cohort.expression(["test_control"])
    return scene.samples[~scene.treated], scene.observed[~scene.treated]


def test_every_test_split_of_the_cohort_is_a_scene(world):
    assert list(world.by_split) == SPLITS


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_has_the_samples_of_its_split_but_for_controls_given_away_in_a_new_study(
    world, split
):
    scene, rows = world.by_split[split][0], world.cohort.rows([split])
    missing = rows[~rows["sample_id"].isin(scene.samples["sample_id"])]
    assert (missing["perturbation"] == "control").all()
    assert bool(len(missing)) == (split == "test_study")
    position = rows.reset_index(drop=True).index[rows["sample_id"].isin(scene.samples["sample_id"])]
    np.testing.assert_array_equal(scene.observed, world.cohort.expression([split])[position])
    np.testing.assert_array_equal(scene.counts, world.cohort.counts([split])[position])
    np.testing.assert_array_equal(
        scene.treated, (scene.samples["perturbation"] != "control").to_numpy()
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("side", ["observed", "predicted", "reference"])
def test_matched_controls_are_the_mean_of_those_of_the_same_study_and_context_else_of_the_context(
    world, split, side
):
    scene = world.by_split[split][0]
    train, expression = world.scenes.train, world.scenes.train_expression
    control = (train["perturbation"] == "control").to_numpy()
    pool, values = (
        hidden_of(world, split) if side == "observed" else (train[control], expression[control])
    )
    if side == "reference" and split == "test_study":
        rows = world.cohort.rows([split])
        given = ~rows["sample_id"].isin(scene.samples["sample_id"]).to_numpy()
        pool, values = (
            pd.concat([pool, rows[given]]),
            np.concatenate([values, world.cohort.expression([split])[given]]),
        )
    found = getattr(scene, f"{side}_control")
    contexts, places = texts(pool, CONTEXT), texts(pool, [*CONTEXT, "study"])
    for row, (context, place) in enumerate(
        zip(texts(scene.samples, CONTEXT), texts(scene.samples, [*CONTEXT, "study"]), strict=True)
    ):
        chosen = [index for index, other in enumerate(places) if other == place] or [
            index for index, other in enumerate(contexts) if other == context
        ]
        np.testing.assert_allclose(found.mean[row], values[chosen].mean(axis=0), rtol=1e-5)
        assert found.number[row] == len(chosen)
        same = found.group == found.group[row]
        assert (found.mean[same] == found.mean[row]).all()


@pytest.mark.parametrize("split", SPLITS)
def test_no_control_is_on_both_sides_and_no_predictor_saw_the_observed_ones(world, split):
    hidden = set(hidden_of(world, split)[0]["sample_id"])
    scene = world.by_split[split][0]
    assert hidden and not hidden & set(world.scenes.train["sample_id"])
    assert not hidden & set(scene.reference_samples["sample_id"])


def test_the_controls_of_a_new_study_are_halved_within_each_context(world):
    rows = world.cohort.rows(["test_study"])
    rows = rows[rows["perturbation"] == "control"]
    scored = rows["sample_id"].isin(world.by_split["test_study"][0].samples["sample_id"])
    for _, halves in scored.groupby([rows["study"], *(rows[name] for name in CONTEXT)]):
        assert halves.sum() - (~halves).sum() in (0, 1)


def test_the_spread_of_controls_is_pooled_around_the_means_of_their_context_and_study(world):
    scene = world.by_split["test_random"][0]
    train = world.scenes.train
    control = (train["perturbation"] == "control").to_numpy()
    pool, values = train[control], world.scenes.train_expression[control].astype(float)
    places, contexts = texts(pool, [*CONTEXT, "study"]), texts(pool, CONTEXT)
    for name in set(contexts):
        squares, freedom = 0.0, 0
        for place in {place for place in places if place[:2] == name}:
            members = values[[other == place for other in places]]
            squares = squares + ((members - members.mean(axis=0)) ** 2).sum(axis=0)
            freedom += len(members) - 1
        assert scene.predicted_control.freedom[" / ".join(name)] == freedom
        np.testing.assert_allclose(
            scene.predicted_control.deviation[" / ".join(name)],
            np.sqrt(squares / freedom),
            rtol=1e-6,
        )


@pytest.mark.parametrize("split", SPLITS)
def test_the_centre_of_systema_counts_every_training_perturbation_of_the_context_once(world, split):
    scene, train, values = (
        world.by_split[split][0],
        world.scenes.train,
        world.scenes.train_expression.astype(float),
    )
    contexts, perturbations = texts(train, CONTEXT), train["perturbation"].to_numpy()
    for row in range(0, len(scene.samples), 7):
        context = texts(scene.samples.iloc[[row]], CONTEXT)[0]
        members = [
            values[
                [
                    contexts[index] == context and perturbations[index] == name
                    for index in range(len(train))
                ]
            ]
            for name in sorted(set(perturbations) - {"control"})
        ]
        centroids = [rows.mean(axis=0) for rows in members if len(rows)]
        np.testing.assert_allclose(
            scene.perturbed_centre[row], np.mean(centroids, axis=0), rtol=1e-5
        )


@pytest.mark.parametrize("split", SPLITS)
def test_conditions_are_context_perturbation_dose_and_time_and_entities_what_the_split_holds_out(
    world, split
):
    scene = world.by_split[split][0]
    keys = texts(
        scene.samples, [*CONTEXT, "perturbation", "perturbation_dose", "perturbation_time"]
    )
    assert (
        len(set(zip(keys, scene.condition, strict=True)))
        == len(set(keys))
        == scene.condition.max() + 1
    )
    held_out = {
        "test_combination": [*CONTEXT, "perturbation"],
        "test_perturbation": ["perturbation"],
        "test_study": ["study"],
    }.get(split)
    entities = texts(scene.samples, held_out) if held_out else keys
    assert (
        len(set(zip(entities, scene.entity, strict=True)))
        == len(set(entities))
        == scene.entity.max() + 1
    )


def test_a_reference_is_a_control_of_the_same_study_and_context_where_there_is_one(world):
    scene, train = world.by_split["test_random"][0], world.scenes.train
    assert (scene.reference_samples["perturbation"] == "control").all()
    possible = set(texts(train[train["perturbation"] == "control"], [*CONTEXT, "study"]))
    for own, chosen in zip(
        texts(scene.samples, [*CONTEXT, "study"]),
        texts(scene.reference_samples, [*CONTEXT, "study"]),
        strict=True,
    ):
        assert own == chosen if own in possible else own[:2] == chosen[:2]
    position = pd.Series(range(len(train)), index=train["sample_id"])[
        scene.reference_samples["sample_id"]
    ]
    np.testing.assert_array_equal(scene.reference, world.scenes.train_expression[position])


def test_a_new_study_is_referred_to_by_its_own_controls(world):
    scene = world.by_split["test_study"][0]
    own = scene.reference_samples["study"].to_numpy() == scene.samples["study"].to_numpy()
    assert own.mean() > 0.9


def test_the_target_is_the_position_of_the_gene_that_the_perturbation_hits(world):
    hit = 0
    for scene, _ in world.by_split.values():
        for name, position in zip(scene.samples["perturbation"], scene.target, strict=True):
            gene = world.cohort.targets.get(name)
            assert position == (
                list(world.cohort.genes).index(gene) if gene in set(world.cohort.genes) else -1
            )
            hit += position >= 0
    assert hit


def declared_without(cohort: Cohort, **changes) -> Cohort:
    plain = Cohort(cohort.folder)
    plain.declared = plain.declared.model_copy(update=changes)
    return plain


def test_without_declared_controls_all_samples_are_treated_and_nothing_is_matched(world):
    plain = EvaluationSplits(declared_without(world.cohort, control=None), world.params.evaluate)
    for scene in plain:
        assert scene.treated.all()
        assert (
            scene.reference
            is scene.observed_control
            is scene.predicted_control
            is scene.reference_control
            is scene.perturbed_centre
            is None
        )
        assert (scene.target == -1).all()


def test_without_studies_controls_match_by_context(world):
    scene = EvaluationSplits(
        declared_without(world.cohort, study_column=None), world.params.evaluate
    ).scene("test_random")
    pool, values = world.cohort.rows(["test_control"]), world.cohort.expression(["test_control"])
    for row, context in enumerate(texts(scene.samples, CONTEXT)):
        np.testing.assert_allclose(
            scene.observed_control.mean[row],
            values[[other == context for other in texts(pool, CONTEXT)]].mean(axis=0),
            rtol=1e-5,
        )
    assert set(scene.study) == {""}


def test_a_context_without_hidden_controls_has_none_and_the_others_keep_theirs(world, monkeypatch):
    scenes = EvaluationSplits(world.cohort, world.params.evaluate)
    pool, values = world.cohort.rows(["test_control"]), world.cohort.expression(["test_control"])
    gone = np.array([context == texts(pool, CONTEXT)[0] for context in texts(pool, CONTEXT)])
    monkeypatch.setattr(scenes, "_hidden_controls", lambda *_: (pool[~gone], values[~gone]))
    scene, whole = scenes.scene("test_random"), world.by_split["test_random"][0]
    without = np.array(
        [context == texts(pool, CONTEXT)[0] for context in texts(scene.samples, CONTEXT)]
    )
    assert without.any() and not without.all()
    assert np.isnan(scene.observed_control.mean[without]).all()
    np.testing.assert_array_equal(
        scene.observed_control.mean[~without], whole.observed_control.mean[~without]
    )
