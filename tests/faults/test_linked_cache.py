"""DVC's cache as links (cache.type hardlink or symlink): a stage that is run by hand writes its own
files and leaves the cache as it is."""

import hashlib
from pathlib import Path

import pytest
from support.repository import Repository

from pipeline.gem.common import yaml_file
from pipeline.gem.data.cohort import Cohort

STAGES = ("synthesize", "prepare", "train", "evaluate")


def wrong_names(cache: Path) -> list[Path]:
    """Files of the cache whose content is not what their name says."""
    return [
        path
        for path in cache.rglob("*")
        if path.is_file()
        and hashlib.md5(path.read_bytes()).hexdigest()
        != (path.parent.name + path.name).removesuffix(".dir")
    ]


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_no_stage_writes_into_the_cache(finished, tmp_path, kind, times, record_property):
    repository = Repository.copy_of(finished, tmp_path / "project")
    repository.dvc("config", "cache.type", kind)
    repository.dvc("checkout", "--relink")
    samples = repository.folder / "data" / "cohort" / "samples.parquet"
    assert samples.is_symlink() if kind == "symlink" else samples.stat().st_nlink > 1
    cache = repository.folder / ".dvc" / "cache" / "files" / "md5"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    changes = {"synthesize.seed": 99, "splits.seed": 99, "train.learning_rate": 0.01}
    yaml_file.edit(repository.folder / "params.yaml", changes)
    for stage in STAGES if times >= 4 else STAGES[:2]:
        repository.stage(f"pipeline.{stage}")
    Cohort(repository.folder / "data" / "cohort")
    assert wrong_names(cache) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    record_property("figure", f"{len(before)} files of the cache: none changed")
