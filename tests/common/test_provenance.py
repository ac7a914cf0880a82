"""The origin of results: DVC's hash of the data, the commit of the code."""

import subprocess

import pytest

from pipeline.gem.common import provenance


def test_the_digest_of_data_is_dvcs_hash_if_dvc_wrote_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sha256 = "0123456789abcdef" * 4
    assert provenance.data_digest("data/cohort", sha256) == sha256[:32]
    (tmp_path / "dvc.lock").write_text(
        "stages:\n  prepare:\n    outs:\n    - path: data/cohort\n      md5: 7d4.dir\n"
    )
    assert provenance.data_digest("data/cohort", sha256) == "7d4.dir"


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    provenance.code_tags.cache_clear()


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_code_tags_name_the_commit_and_a_dirty_working_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    (tmp_path / "pipeline").mkdir()
    for name in ("params.yaml", "pipeline/x.py", "requirements.lock"):
        (tmp_path / name).write_text("a: 1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    tags = provenance.code_tags()
    assert tags["git.dirty"] == "false" and len(tags["git.commit"]) == 40
    provenance.code_tags.cache_clear()
    (tmp_path / "params.yaml").write_bytes(b"a: \xfc\n")
    tags = provenance.code_tags()
    assert tags["git.dirty"] == "true" and len(tags["git.diff_sha256"]) == 64


DUBIOUS = """echo "fatal: detected dubious ownership in repository at '/p'
To add an exception for this directory, call:

	git config --global --add safe.directory /p" >&2; exit 128"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("fail", "not a git repository"),
        (
            DUBIOUS,
            "dubious ownership in repository at '/p'; run `git config --global --add safe.dir",
        ),
        ("echo 'fatal: bad object HEAD' >&2; exit 128", "bad object HEAD; see `git status`"),
        (None, "git cannot be run"),
    ],
)
def test_a_git_that_refuses_is_one_warning(script, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    if script != "fail":
        monkeypatch.setenv("PATH", str(tmp_path))
    if script not in ("fail", None):
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    for _ in range(2):
        assert provenance.code_tags() == {}
    (record,) = caplog.records
    assert record.getMessage().startswith("the runs in MLflow carry no git commit: ")
    assert message in record.getMessage() and "\n" not in record.getMessage()
