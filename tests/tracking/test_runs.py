"""Tracking: real MLflow on a real SQLite store."""

import shutil
import subprocess
import sys
import warnings

import mlflow
import pytest
from support.settings import ROOT

from pipeline.gem.common import provenance
from pipeline.gem.tracking import mlflow_client, runs


@pytest.fixture(autouse=True)
def _store(tmp_path, monkeypatch, migrated_store):
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow_client.connect("gem")
    yield
    mlflow.set_tracking_uri(before)


def test_the_default_store_has_mlflows_own_names(tmp_path):
    with runs.run("one", "train") as run:
        pass
    assert (
        mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run.id).info.run_name
        == "one"
    )


def test_another_store_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    mlflow_client.connect("gem")
    with runs.run("one", "train"):
        pass
    assert (tmp_path / "elsewhere.db").exists()


def test_a_run_ends_as_it_went():
    with runs.run("well", "train") as well:
        pass
    with pytest.raises(ValueError), runs.run("badly", "train") as badly:
        raise ValueError
    with pytest.raises(KeyError), runs.run("pruned", "tune", killed_by=(KeyError,)) as pruned:
        raise KeyError
    assert [mlflow.get_run(run.id).info.status for run in (well, badly, pruned)] == [
        "FINISHED",
        "FAILED",
        "KILLED",
    ]


def test_children_are_grouped_under_their_parent_and_a_resumed_run_is_the_same_run():
    with runs.run("parent", "tune") as parent, runs.run("child", "tune", parent=parent.id) as child:
        child.metrics({"a": 1.0}, step=1)
    assert mlflow.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id
    with runs.run("parent", "tune", resume=parent.id) as again:
        again.metrics({"b": 2.0})
    assert again.id == parent.id
    assert mlflow.get_run(parent.id).data.metrics == {"b": 2.0}


def test_a_finished_run_is_completed_without_being_opened_again():
    with runs.run("default", "train") as run:
        pass
    before = mlflow.get_run(run.id).info
    runs.complete(run.id, {"test_random/mse": 0.5, "nothing": float("nan")}, {"predictor": "gem"})
    after = mlflow.get_run(run.id)
    assert (after.info.end_time, after.info.status) == (before.end_time, "FINISHED")
    assert after.data.metrics == {"test_random/mse": 0.5}
    assert after.data.tags["predictor"] == "gem"


def test_a_number_that_is_not_finite_is_left_out_not_stored_as_another():
    with runs.run("one", "train") as run:
        run.metrics(
            {"fine": 1.0, "infinite": float("inf"), "nothing": float("nan"), "absent": None}
        )
    assert mlflow.get_run(run.id).data.metrics == {"fine": 1.0}


def test_a_parameter_that_mlflow_would_cut_is_refused():
    with pytest.raises(Exception, match="shorten it"), runs.run("one", "train") as run:
        run.params({"long": "x" * 7000})


def test_a_models_run_is_found_by_hash_predictor_and_stage():
    assert runs.find_model_run("f" * 64, "gem", "train") is None
    with runs.run("default", "train") as default:
        default.tags({runs.MODEL_TAG: "f" * 64})
    with runs.run("winner", "tune") as winner:
        winner.tags({runs.MODEL_TAG: "f" * 64})
    assert runs.find_model_run("f" * 64, "gem", "train") == default.id
    assert runs.find_model_run("f" * 64, "gem_tuned", "tune") == winner.id
    with runs.run("opened anew", "evaluate") as anew:
        anew.tags({runs.MODEL_TAG: "e" * 64, runs.PREDICTOR_TAG: "gem"})
    assert runs.find_model_run("e" * 64, "gem", "train") == anew.id


def test_the_datas_digest_is_dvcs_hash_where_dvc_wrote_one(tmp_path):
    assert provenance.data_digest("data/cohort", "0123456789abcdef" * 4) == "0123456789abcdef" * 2
    (tmp_path / "dvc.lock").write_text(
        "stages:\n  prepare:\n    outs:\n    - path: data/cohort\n      md5: 7d4.dir\n"
    )
    assert provenance.data_digest("data/cohort", "0" * 64) == "7d4.dir"


def test_the_code_is_tagged_with_commit_and_dirt(tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    assert provenance.code_tags() == {}
    git("init", "--quiet")
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "x.py").write_text("")
    (tmp_path / "requirements.lock").write_text("")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    assert provenance.code_tags()["git.dirty"] == "false"
    (tmp_path / "params.yaml").write_text("a: 2\n")
    dirty = provenance.code_tags()
    assert dirty["git.dirty"] == "true"
    assert len(dirty["git.diff_sha256"]) == 64


def test_machines_that_make_the_experiment_in_the_same_moment_share_it(monkeypatch):
    """MLflow looks the name up, finds nothing, and fails to make what another machine has made meanwhile."""
    theirs = mlflow.MlflowClient().create_experiment("shared")
    looked_up = (
        mlflow.tracking._tracking_service.client.TrackingServiceClient.get_experiment_by_name
    )
    answers = iter([lambda *_: None, looked_up])

    def too_early(client, name):
        return next(answers)(client, name)

    monkeypatch.setattr(
        mlflow.tracking._tracking_service.client.TrackingServiceClient,
        "get_experiment_by_name",
        too_early,
    )
    mlflow_client.connect("shared")
    with runs.run("one", "train") as run:
        pass
    assert mlflow.get_run(run.id).info.experiment_id == theirs


def test_two_processes_may_open_a_fresh_store_at_once(tmp_path):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    code = "from pipeline.gem.tracking import mlflow_client, runs; mlflow_client.connect('gem')\nwith runs.run('x', 'train'): pass"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=fresh,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outcomes = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = mlflow.MlflowClient(f"sqlite:///{fresh}/mlflow.db")
        assert len(client.search_runs([client.get_experiment_by_name("gem").experiment_id])) == 2
