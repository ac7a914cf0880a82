"""The files of a search."""

from pathlib import Path

import pandas as pd
from support.searches import LATENT, NO_PRUNER, open_search, run, search_config

from pipeline.gem.common import yaml_file
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search.confirmation import Confirmation
from pipeline.gem.search.results import write_results

FOLDER = Path("results")


def test_best_yaml_holds_the_winner_in_the_shape_of_params_yaml(params):
    config = search_config(pruner=NO_PRUNER)
    search = run(open_search(params, config), 6)
    confirmation = Confirmation(search, config.confirm, epochs=1)
    confirmation.run(lambda pair: float(pair.values["trial"]), StopSignal(), lambda pair: None)
    decision = confirmation.decide()
    write_results(FOLDER, search, confirmation, decision)
    assert (FOLDER / "best.yaml").read_text().startswith(f"# {decision.summary}\n")
    best = yaml_file.read(FOLDER / "best.yaml").values
    assert best["model"]["latent"]["technical"] == decision.values[LATENT]
    assert len(pd.read_csv(FOLDER / "trials.csv")) == 6
    assert len(pd.read_csv(FOLDER / "confirmed.csv")) == 2


def test_without_a_decision_the_baseline_is_the_winner_and_every_file_exists(params):
    search = open_search(params)
    write_results(FOLDER, search, None, None)
    best = yaml_file.read(FOLDER / "best.yaml").values
    assert best["model"]["latent"]["technical"] == search.baseline[LATENT]
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"best.yaml", "trials.csv", "importance.csv", "confirmed.csv", "figures"}
