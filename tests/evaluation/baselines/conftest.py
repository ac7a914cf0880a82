"""Samples that several baselines are fitted to."""

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    """Random metadata with missing values, more levels than a design of full rank has."""
    rng = np.random.default_rng(0)
    samples = pd.DataFrame(
        {
            "study": rng.choice(["a", "b", "c"], 80),
            "tissue": np.where(rng.random(80) < 0.2, None, rng.choice(["liver", "lung"], 80)),
            "perturbation": rng.choice(["control", "x", "y"], 80),
            "age_years": np.where(rng.random(80) < 0.7, rng.uniform(20, 80, 80), np.nan),
        }
    )
    dose = rng.choice(["100 nM", "1 uM"], 80)
    return samples.assign(perturbation_dose=np.where(samples["perturbation"] == "x", dose, None))
