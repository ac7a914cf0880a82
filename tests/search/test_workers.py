"""Forked workers share the memory of their parent."""

import subprocess
import sys

import pytest
from support.settings import ROOT

CODE = """
import re, sys
import torch
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.workers import Workers, prepare_to_fork
prepare_to_fork()
data = torch.rand(50_000_000)   # 200 MB

def work(stop):
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
