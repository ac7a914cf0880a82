"""Checks params.yaml and the studies, changes a value, or promotes the winner of a search; comments are kept.

Run     python -m pipeline.configure                        check everything, before any data is read
        python -m pipeline.configure --set tune.trials=40   write a value and show the difference
        python -m pipeline.configure --budget capacity=80   write the number of trials where that study has it
        python -m pipeline.configure --promote latent_kl    write experiments/latent_kl/best.yaml into params.yaml
"""

import argparse
import difflib
from pathlib import Path

from pydantic import ValidationError

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params, explain, flatten, read_params
from pipeline.gem.common.errors import GemError, InputError, did_you_mean, exit_with
from pipeline.gem.search.search_config import EXPERIMENTS, SEARCHES, read_search_config

PARAMS = Path("params.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--promote", metavar="STUDY")
    parser.add_argument("--budget", metavar="SEARCH=TRIALS")
    chosen = parser.parse_args()
    check()
    changes = dict(parse(text) for text in chosen.set)
    if chosen.budget:
        changes |= budget(*parse(chosen.budget))
    if chosen.promote:
        changes |= winner(chosen.promote)
    if changes:
        apply(changes)


def check() -> None:
    """Every problem of params.yaml; then every problem of every study."""
    params = read_params(PARAMS)
    problems: list[str] = []
    for path in sorted(SEARCHES.glob("*.yaml")):
        try:
            read_search_config(path.stem, params)
        except GemError as error:
            problems += error.problems
    source = Path(params.data.source)
    # DVC would die of a missing file before our code runs; the synthetic folder is a stage's output.
    if not source.exists() and source != Path("data/synthetic"):
        problems.append(
            f"{PARAMS}: data.source: {source} does not exist; give a folder of Parquet files or an .h5ad file"
        )
    if problems:
        raise InputError(*problems)


def parse(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--set {text}: expected KEY=VALUE, as in tune.trials=40")
    return name.strip(), yaml_file.parse_scalar(value)


def budget(study: str, trials: object) -> dict[str, object]:
    """Writes a budget into the study's file; where it has none, what is to be changed in params.yaml."""
    if read_search_config(study, read_params(PARAMS)).trials is None:
        return {"tune.trials": trials}
    if not isinstance(trials, int) or trials < 1:
        raise InputError(f"{study}: trials is {trials!r}; expected a whole number, 1 or more")
    show(
        SEARCHES / f"{study}.yaml", *yaml_file.edit(SEARCHES / f"{study}.yaml", {"trials": trials})
    )
    return {}


def winner(study: str) -> dict[str, object]:
    """The answer of a search: values of keys that it asked about, and of no others."""
    space = read_search_config(study, read_params(PARAMS)).space
    path = EXPERIMENTS / study / "best.yaml"
    if not path.exists():
        raise InputError(f"{path}: absent; `make tune SEARCH={study}` writes it")
    document = yaml_file.read(path)
    best = flatten(document.values)
    problems = [
        f"{document.where(tuple(name.split('.')))}: {name} is no key that {study} searched; remove it"
        for name in best
        if name not in space
    ]
    if problems:
        raise InputError(*problems)
    return best


def apply(changes: dict[str, object]) -> None:
    """Writes valid changes only, and shows what changed."""
    params = read_params(PARAMS)
    known = params.flat()
    unknown = [
        f"{PARAMS}: {name} is unknown{did_you_mean(name, known)}"
        for name in changes
        if name not in known
    ]
    if unknown:
        raise InputError(*unknown)
    try:
        params.override(changes)
    except ValidationError as error:
        document = yaml_file.read(PARAMS)
        raise InputError(
            *(explain(problem, Params, document) for problem in error.errors())
        ) from None
    show(PARAMS, *yaml_file.edit(PARAMS, changes))


def show(path: Path, before: str, after: str) -> None:
    difference = list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), str(path), str(path), n=0, lineterm=""
        )
    )
    print("\n".join(difference) if difference else f"{path} says so already")


if __name__ == "__main__":
    exit_with(main)
