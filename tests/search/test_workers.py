"""The default number of workers; forked workers share the memory of their parent."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.searches import search_config
from support.settings import ROOT

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search import run
from pipeline.gem.search.run import SearchSession
from pipeline.gem.search.workers import Workers

CODE = """
import re, sys
import torch
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.workers import Workers, prepare_to_fork
prepare_to_fork()
data = torch.rand(50_000_000)   # 200 MB

def work(number, stop):
    (data[:1_000_000] * 2).sum(), data.sum()
    pages = open("/proc/self/smaps_rollup").read()
    private = sum(int(size) for size in re.findall(r"Private_\\w+:\\s+(\\d+) kB", pages))
    with open(sys.argv[1], "a") as file:
        file.write(f"{private}\\n")

with StopSignal() as stop, Workers(2, work) as workers:
    workers.wait(stop)
"""


@pytest.mark.integration
def test_the_memory_of_the_parent_is_not_copied(tmp_path):
    path = tmp_path / "sizes"
    subprocess.run([sys.executable, "-c", CODE, str(path)], cwd=ROOT, check=True, timeout=60)
    sizes = [int(line) / 1024 for line in path.read_text().split()]
    assert len(sizes) == 2 and max(sizes) < 60, f"{sizes} MB of their own beside 200 MB of data"


@pytest.mark.parametrize(
    ("places", "memory", "expected"),
    [
        (1, 1e12, 1),
        (2, 1e12, 2),
        (64, 1e12, 12),  # a worker per trial
        (64, 1.5e9, 2),  # of 0.6 GB each
        (64, 1e6, 1),
    ],
)
def test_there_are_as_many_workers_as_cores_or_gpus_and_memory_for_them(
    params, monkeypatch, places, memory, expected
):
    monkeypatch.setattr(run, "available_memory", lambda: memory)
    cohort = SimpleNamespace(manifest={"samples": 1000, "genes": 100})
    session = SimpleNamespace(config=search_config(), trials=12, cohort=cohort)
    assert SearchSession._default_workers(session, places, params) == expected


def test_each_worker_has_a_number(tmp_path):
    def work(number, stop):
        (tmp_path / str(number)).touch()

    with StopSignal() as stop, Workers(3, work) as workers:
        workers.wait(stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_more_workers_than_gpus_are_refused(params, monkeypatch):
    monkeypatch.setattr(run, "choose_device", lambda train: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="3 workers for 2 GPUs"):
        SearchSession("s", search_config(), params, 3)
