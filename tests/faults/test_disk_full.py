"""A disk that fills up at any write of a stage: one line, no half artifact, an equal rerun."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.repository import Repository

from pipeline.gem.common.files import sha256
from pipeline.gem.data.cohort import Cohort

PREDICT = ("--model", "experiments/default", "--query", "query.csv", "--output")
SLOW = ("train", "tune", "evaluate", "register")
# A stage, its arguments, the folder of its output, and about how many bytes it writes.
STAGES = {
    "synthesize": ((), "data/synthetic", 150_000),
    "prepare": ((), "data/cohort", 300_000),
    "train": ((), "experiments/default", 700_000),
    "tune": (("--search", "latent_kl"), "experiments/latent_kl", 900_000),
    "evaluate": ((), "experiments/evaluation", 2_500_000),
    "register": ((), "experiments", 100_000),
    "predict": ((*PREDICT, "out/x.parquet"), "out", 50_000),
    "predict to h5ad": ((*PREDICT, "out/x.h5ad"), "out", 100_000),
}
NO_SPACE = "No space left on device"


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory) -> Iterator[Repository]:
    """A finished project on a small disk of its own, with the logs of its stages elsewhere."""
    disk, logs = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("logs")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    try:
        repository = Repository.copy_of(finished, disk / "project")
        for module in {stage.split()[0] for stage in STAGES}:
            (repository.folder / f"pipeline.{module}.log").symlink_to(logs / module)
        samples = Cohort(repository.folder / "data" / "cohort").samples
        columns = ["tissue", "cell_type", "perturbation"]
        pd.concat([samples[columns]] * 2).to_csv(repository.folder / "query.csv", index=False)
        yield repository
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_the_rerun_is_equal(project, stage, times, record_property):
    if stage in SLOW and times < 4:
        pytest.skip("takes long; run it with --times 4 or more")
    arguments, output, written = STAGES[stage]
    module, folder = f"pipeline.{stage.split()[0]}", project.folder / output
    filler = project.folder.parent / "filler"
    if stage.startswith("predict"):
        project.stage(module, *arguments)
    expected, refused = contents(folder), 0
    # From no space at all to enough of it.
    for free in np.linspace(0, written, times).astype(int):
        with open(filler, "wb") as file:
            left = shutil.disk_usage(filler.parent).free - int(free)
            file.write(b"\0" * max(0, left))
        before = len(project.log(module))
        code = project.start(module, *arguments).wait(timeout=300)
        log = project.log(module)[before:]
        filler.unlink()
        assert "Traceback" not in log and "Exception ignored" not in log, log
        assert contents(folder) == expected, log
        if code:
            errors = [line for line in log.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(errors) == 1 and NO_SPACE in errors[0], log
            refused += 1
    project.stage(module, *arguments)
    assert contents(folder) == expected
    record_property(
        "figure",
        f"{times} full disks: {refused} refused in one line, outputs whole, rerun equal",
    )
