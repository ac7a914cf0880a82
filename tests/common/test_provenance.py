"""The origin of results: DVC's hash of the data, the commit of the code."""

import subprocess

from pipeline.gem.common import provenance


def test_the_digest_of_data_is_dvcs_hash_if_dvc_wrote_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sha256 = "0123456789abcdef" * 4
    assert provenance.data_digest("data/cohort", sha256) == sha256[:32]
    (tmp_path / "dvc.lock").write_text(
        "stages:\n  prepare:\n    outs:\n    - path: data/cohort\n      md5: 7d4.dir\n"
    )
    assert provenance.data_digest("data/cohort", sha256) == "7d4.dir"


def test_code_tags_name_the_commit_and_a_dirty_working_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    assert provenance.code_tags() == {}
    git("init", "--quiet")
    (tmp_path / "pipeline").mkdir()
    for name in ("params.yaml", "pipeline/x.py", "requirements.lock"):
        (tmp_path / name).write_text("a: 1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    tags = provenance.code_tags()
    assert tags["git.dirty"] == "false" and len(tags["git.commit"]) == 40
    (tmp_path / "params.yaml").write_text("a: 2\n")
    tags = provenance.code_tags()
    assert tags["git.dirty"] == "true" and len(tags["git.diff_sha256"]) == 64
