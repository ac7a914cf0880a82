"""Searches: what is asked, what is stored, what is continued. Real SQLite."""

import math

import pytest

from pipeline.gem.errors import DivergedError
from pipeline.gem.question import Question
from pipeline.gem.search import Pruned, Search

SPACE = {
    "model.latent.technical": {"type": "integer", "low": 2, "high": 64, "log": True},
    "train.kl_weight.technical": {"type": "float", "low": 0.01, "high": 4.0, "log": True},
}


@pytest.fixture(autouse=True)
def _own_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


def question(**changes) -> Question:
    return Question.model_validate(
        {
            "question": "?",
            "space": SPACE,
            "baseline": {"model": {"latent": {"technical": 4}}, "train": {"kl_weight": {"technical": 1.0}}},
            "objective": {"metric": "predictive_log_likelihood", "direction": "maximize"},
            "sampler": {"name": "tpe", "seed": 1, "startup_trials": 3},
            "pruner": {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
            "epochs": 4,
        }
        | changes
    )


def search(params, asked=None, data="a" * 64) -> Search:
    return Search("study", asked or question(), params, data)


def score(asked) -> float:
    """A smooth landscape with its best at latent 16 and KL weight 0.1."""
    latent, weight = asked.values["model.latent.technical"], asked.values["train.kl_weight.technical"]
    return -((math.log2(latent) - 4) ** 2) - (math.log10(weight) + 1) ** 2


def ignore(*_) -> None:
    pass


def points(found: Search) -> list[tuple]:
    return [tuple(trial.params.values()) for trial in found.finished]


def test_the_baseline_is_trial_zero(params):
    found = search(params)
    found.run(3, score, ignore)
    assert found.finished[0].params == {"model.latent.technical": 4, "train.kl_weight.technical": 1.0}


def test_a_second_call_continues_to_the_budget_neither_over_nor_under(params):
    search(params).run(4, score, ignore)
    again = search(params)
    assert len(again.finished) == 4
    again.run(7, score, ignore)
    assert len(search(params).finished) == 7
    search(params).run(7, score, ignore)
    assert len(search(params).finished) == 7


def test_no_point_is_proposed_twice_after_a_resume(params):
    for budget in (2, 4, 6, 8):
        search(params).run(budget, score, ignore)
    found = points(search(params))
    assert len(set(found)) == len(found) == 8


def test_the_same_seed_gives_the_same_search(params, tmp_path, monkeypatch):
    def run(folder: str) -> list[tuple]:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        found = search(params)
        found.run(6, score, ignore)
        return points(found)

    assert run("one") == run("two")


def test_the_search_finds_better_than_its_baseline(params):
    found = search(params)
    found.run(25, score, ignore)
    assert found.study.best_value > found.finished[0].value + 1
    assert score(type("Asked", (), {"values": found.best_values()})) == found.study.best_value


def test_another_question_another_cohort_or_another_fixed_parameter_is_another_study(params):
    names = {
        search(params).name,
        search(params, question(epochs=5)).name,
        search(params, data="b" * 64).name,
        search(params.override({"train.learning_rate": 0.123})).name,
    }
    assert len(names) == 4


def test_a_searched_key_of_params_is_no_part_of_the_question(params):
    assert search(params).name == search(params.override({"model.latent.technical": 33})).name


def test_wording_is_no_part_of_the_question(params):
    assert search(params).name == search(params, question(question="Other words?")).name


def test_a_changed_question_says_that_it_starts_anew(params):
    search(params).run(1, score, ignore)
    changed = search(params, question(epochs=5))
    assert changed.is_new
    assert changed.others == [search(params).name]


def test_pruned_trials_count_and_keep_the_value_they_had(params):
    def evaluate(asked):
        for epoch in range(1, 5):
            asked.report(-100.0 * asked.number, epoch)
        return -100.0 * asked.number

    found = search(params)
    found.run(6, evaluate, ignore)
    table = found.trials_table()
    assert table["state"].tolist()[:2] == ["complete", "complete"]
    assert set(table["state"][2:]) == {"pruned"}
    assert (table["epochs"][2:] == 1).all(), "pruning starts when warmup_epochs are done"
    assert table["value"].tolist() == [-100.0 * number for number in range(6)]


def test_pruning_looks_like_an_exception_that_passes_through_the_fit(params):
    seen = []

    def evaluate(asked):
        try:
            asked.report(-float(asked.number), 2)
        except Pruned:
            seen.append(asked.number)
            raise
        return -float(asked.number)

    search(params).run(5, evaluate, ignore)
    assert seen


def test_a_diverged_trial_fails_with_its_reason_and_the_search_goes_on(params):
    def evaluate(asked):
        if asked.number == 1:
            raise DivergedError("loss is not finite at step 3")
        return score(asked)

    found = search(params)
    found.run(4, evaluate, ignore)
    assert found.trials_table()["state"].tolist() == ["complete", "failed", "complete", "complete"]


def test_a_search_without_any_usable_trial_ends_with_the_reasons(params):
    def evaluate(asked):
        raise DivergedError(f"broken at step {asked.number}")

    with pytest.raises(DivergedError, match="none of 2 trials is usable: broken at step 0; broken at step 1") as caught:
        search(params).run(2, evaluate, ignore)
    assert caught.value.exit_code == 3


def test_a_value_that_is_no_number_never_wins(params):
    found = search(params)
    found.run(5, lambda asked: float("nan") if asked.number == 1 else score(asked), ignore)
    assert found.trials_table()["state"].tolist().count("failed") == 1


def test_importance_finds_the_parameter_that_matters(params):
    found = search(params)
    found.run(20, lambda asked: -abs(math.log10(asked.values["train.kl_weight.technical"])), ignore)
    table = found.importance_table().set_index("parameter")
    assert table.loc["train.kl_weight.technical", "ped_anova"] > 0.8
    assert table.loc["train.kl_weight.technical", "fanova"] > 0.8


def test_importance_is_empty_not_invented_with_too_few_trials(params):
    found = search(params)
    found.run(2, score, ignore)
    assert found.importance_table()[["ped_anova", "fanova"]].isna().all().all()


def test_the_parent_run_is_remembered_by_the_study(params):
    found = search(params)
    assert found.run_id is None
    found.run_id = "abc"
    assert search(params).run_id == "abc"
