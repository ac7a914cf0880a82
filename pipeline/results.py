"""Prints the results of the last evaluation as tables. Imports neither the model nor MLflow.

Reads   params.yaml (evaluate.search); experiments/evaluation/; experiments/<evaluate.search>/
Run     python -m pipeline.results
"""

import argparse

import pandas as pd

from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError, exit_with
from pipeline.gem.evaluation.catalogue import EXPERIMENTS, OUTPUT, TABLE_FILES, TUNED
from pipeline.gem.evaluation.report.console import show_results
from pipeline.gem.evaluation.report.landscape import summary_of


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    scores, comparisons = (OUTPUT / TABLE_FILES[name] for name in ("scores", "comparisons"))
    search = EXPERIMENTS / read_params().evaluate.search
    for path in (scores, comparisons, search / "best.yaml"):
        if not path.exists():
            raise InputError(f"{path}: not found; `dvc repro` writes it")
    table = pd.read_csv(scores)
    show_results(table, pd.read_csv(comparisons))
    result = "" if (table["predictor"] == TUNED).any() else "the defaults stay: "
    print(f"search {search.name}: {result}{summary_of(search / 'best.yaml')}")


if __name__ == "__main__":
    exit_with(main)
