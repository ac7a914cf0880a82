"""Random damage to the files of a cohort and of a source: found or irrelevant, and no crash."""

import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
import pytest
import scipy.sparse
from support.settings import at_source

from pipeline.gem.common.errors import GemError, InputError, IntegrityError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import check_unique, checked_chunks, open_source
from pipeline.gem.data.storage import reading

MEMORY = 8 * 2**30  # bytes of address space of a reading process
SECONDS = 120


def damage(content: bytes, rng: random.Random) -> bytes:
    """A flipped bit, some of them, zeros as in a download with holes, or a lost end."""
    changed, place = bytearray(content), rng.randrange(len(content))
    match rng.choice(["bit", "bit", "bits", "zeros", "cut"]):
        case "bit":
            changed[place] ^= 1 << rng.randrange(8)
        case "bits":
            for _ in range(4):
                changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "zeros":
            end = place + rng.choice([8, 64, 512])
            changed[place:end] = bytes(len(changed[place:end]))
        case "cut":
            changed = changed[:place]
    return bytes(changed)


def is_one_line(error: GemError) -> bool:
    (problem,) = error.problems
    return problem.isprintable() and len(problem) <= 300


def test_no_damage_to_a_cohort_is_silent(cohort, tmp_path, times, record_property):
    rng, folder = random.Random(times), tmp_path / "cohort"
    shutil.copytree(cohort.folder, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    splits, outcomes = list(cohort.manifest["splits"]), Counter()
    counts = cohort.counts(splits)
    for _ in range(10 * times):
        path = rng.choice(files)
        intact = path.read_bytes()
        path.write_bytes(damage(intact, rng))
        try:
            damaged = Cohort(folder)
            same = (damaged.counts(splits) == counts).all() and damaged.truth_folder is not None
            # What a JSON file says may be the same in other bytes, and zeros may have been zeros.
            unchanged = path.read_bytes() == intact or path.name == "manifest.json"
            assert unchanged and same and damaged.manifest == cohort.manifest, path
            outcomes["irrelevant"] += 1
        except IntegrityError as error:
            assert is_one_line(error) and path.name in str(error)
            outcomes["refused"] += 1
        path.write_bytes(intact)
    record_property("figure", f"{10 * times} damaged cohorts: {describe(outcomes)}, 0 silent")


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "folder"])
def test_no_damage_to_a_source_crashes(
    params, source_folder, tmp_path, monkeypatch, times, record_property, form
):
    monkeypatch.setattr(reading, "CHILD_SECONDS", 2)
    data = params.override(at_source(source_folder)).data
    path = write_source(data, tmp_path, form)
    data = data.model_copy(update={"source": str(path)})
    files = sorted(file for file in path.rglob("*.parquet")) if path.is_dir() else [path]
    rng, outcomes = random.Random(times), Counter()

    def read() -> None:
        """As the stages do: distinct names, then counts."""
        source = open_source(data)
        for table, key in ((source.samples, "sample_id"), (source.genes, "gene_id")):
            if problems := check_unique(table, key, data.source):
                raise InputError(*problems)
        for _ in checked_chunks(source, data.source):
            pass

    read()
    for _ in range(5 * times):
        file = rng.choice(files)
        intact = file.read_bytes()
        file.write_bytes(damage(intact, rng))
        outcomes[in_child(read)] += 1
        file.write_bytes(intact)
    assert not outcomes.keys() - {"refused", "read"}, outcomes
    record_property("figure", f"{5 * times} damaged sources ({form}): {describe(outcomes)}")


def write_source(data, folder: Path, form: str) -> Path:
    if form == "folder":
        return Path(shutil.copytree(data.source, folder / "source"))
    source = open_source(data)
    ((_, counts),) = source.chunks()
    samples = source.samples.set_index("sample_id").loc[source.samples["sample_id"]]
    matrix = {"dense": lambda x: x, "csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}
    var = pd.DataFrame(index=source.genes["gene_id"].to_numpy())
    content = anndata.AnnData(matrix[form](counts.astype("float32")), samples, var)
    content.write_h5ad(folder / "source.h5ad", compression="gzip" if form == "csc" else None)
    return folder / "source.h5ad"


def in_child(read: Callable[[], None]) -> str:
    """How `read` ends in a process of its own: refused, read, or what is wrong."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            read()
            outcome = "read"
        except InputError as error:
            outcome = "refused" if is_one_line(error) else f"several lines: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(sender, outcome.encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as file:
        outcome = file.read()
    _, status = os.waitpid(child, 0)
    return outcome or f"signal {os.WTERMSIG(status)}"


def describe(outcomes: Counter) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
