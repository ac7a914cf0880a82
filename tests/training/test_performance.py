"""Speed of training against the plain loop. `make benchmark` measures it at full size."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.networks import METADATA_SIZES
from support.settings import ROOT

from benchmarks.plain_loop import PlainGEM
from benchmarks.training import LOOPS, SIZES, build_loops, compare
from pipeline.gem.common.config import GROUPS


def test_the_plain_loop_has_the_losses_of_the_reference(monkeypatch):
    """With the reference's weights and noise."""
    with np.load(ROOT / "tests" / "fixtures" / "gem1_forward.npz") as arrays:
        gem1 = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    latents = {"technical": 2, "biological": 3, "perturbation": 2}
    plain = PlainGEM(12, METADATA_SIZES, width=8, blocks=2, latents=latents)
    names = plain.state_dict()
    plain.load_state_dict({name: gem1[f"weight/{name}"] for name in names})
    noise = torch.cat([gem1[f"noise/{group}"] for group in GROUPS], dim=1)
    parts = iter(noise.split(list(latents.values()), dim=1))
    normal = torch.distributions.normal
    monkeypatch.setattr(normal, "_standard_normal", lambda *_, **__: next(parts))
    index = {group: gem1[f"input/{group}"] for group in GROUPS}
    losses = plain(gem1["input/counts"].float(), index)
    torch.testing.assert_close(losses["reconstruction"], gem1["output/recon_loss"])
    torch.testing.assert_close(losses["divergence"], gem1["output/kl_loss"])


def test_threads_of_a_stage_do_not_spin_while_they_wait():
    """The variable counts only if it is set before torch is imported."""
    program = "import os, sys, pipeline; print('torch' in sys.modules, os.environ['{}'])"
    command = [sys.executable, "-c", program.format("OMP_WAIT_POLICY")]
    output = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "PASSIVE"]


@pytest.mark.integration
def test_the_default_objective_trains_as_fast_as_the_plain_loop():
    """At M, with three times its terms: the best of three turns, because other work disturbs some.
    The margin is 10 %."""
    loops = build_loops(replace(SIZES["M"], samples=512))
    seconds = compare({name: loops[name] for name in LOOPS[:2]}, turns=3)
    plain, default = seconds.values()
    assert max(slow / fast for slow, fast in zip(plain, default, strict=True)) > 0.9
