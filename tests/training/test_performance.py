"""Speed of training against the plain loop. `make benchmark` measures it at full size."""

import subprocess
import sys

import numpy as np
import torch
from support.networks import METADATA_SIZES
from support.settings import ROOT

from benchmarks.plain_loop import PlainGEM
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
