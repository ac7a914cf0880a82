"""Checks params.yaml and the searches, sets a value, or promotes the winner of a search.

Reads   params.yaml, experiments/searches/*.yaml, experiments/NAME/best.yaml (--promote)
Writes  params.yaml, or the definition of a search (--budget); comments stay
Run     python -m pipeline.configure                        check everything before data are read
        python -m pipeline.configure --set tune.trials=40   set a value and show the difference
        python -m pipeline.configure --budget capacity=80   set the number of trials of a search
        python -m pipeline.configure --promote latent_kl    copy the winner into params.yaml
"""

import argparse
import difflib
import json
from pathlib import Path

from pydantic import ValidationError

from pipeline.gem.common import yaml_file
from pipeline.gem.common.capacity import (
    Size,
    evaluation_needs,
    require,
    synthesis_needs,
    training_needs,
)
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.config_errors import validation_error
from pipeline.gem.common.errors import GemError, InputError, did_you_mean, exit_with
from pipeline.gem.common.provenance import repository_problem
from pipeline.gem.common.yaml_file import flatten
from pipeline.gem.data.tables import reserved_name_problems
from pipeline.gem.search.search_config import (
    EXPERIMENTS,
    SEARCHES,
    SearchConfig,
    misnamed,
    read_search_config,
    search_files,
    size_problems,
)

PARAMS, COHORT, SYNTHETIC = Path("params.yaml"), Path("data/cohort"), Path("data/synthetic")
SOURCE_FORMATS = "a folder of Parquet files, or an .h5ad file"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--promote", metavar="SEARCH")
    parser.add_argument("--budget", metavar="SEARCH=TRIALS")
    arguments = parser.parse_args()
    if not (arguments.set or arguments.budget or arguments.promote):
        check()
    assignments = [parse_assignment(text) for text in arguments.set]
    changes = dict(assignments)
    if len(changes) < len(assignments):
        raise InputError("--set: a key appears twice; remove one")
    if arguments.budget:
        changes |= set_budget(*parse_assignment(arguments.budget))
    if arguments.promote:
        changes |= best_values(arguments.promote)
    if changes:
        set_params(changes)


def check() -> None:
    """Raises InputError with the problems of params.yaml, else with all others."""
    params = read_params(PARAMS)
    problems = [problem] if (problem := repository_problem()) else []
    cohort = cohort_size(params)
    needs = [*training_needs(cohort), *evaluation_needs(cohort)]
    if Path(params.data.source) == SYNTHETIC:
        needs += synthesis_needs()
    try:
        require(needs, params)
    except GemError as error:
        problems += error.problems
    for path in search_files():
        if problem := misnamed(path):
            problems.append(problem)
            continue
        try:
            search = read_search_config(path.stem, params)
            problems += size_problems(path.stem, search, params, cohort)
        except GemError as error:
            problems += error.problems
    where = yaml_file.read(PARAMS).where(("data",))
    problems += [f"{where}: {problem}" for problem in reserved_name_problems(params.data)]
    if problem := source_problem(Path(params.data.source)):
        where = yaml_file.read(PARAMS).where(("data", "source"))
        problems.append(f"{where}: data.source: {problem}")
    if problems:
        raise InputError(*problems)


def cohort_size(params: Params) -> Size:
    """Samples and genes of the synthetic cohort, or of the prepared one; 1 where unknown."""
    if Path(params.data.source) == SYNTHETIC:
        return {"samples": params.synthesize.samples, "genes": params.synthesize.genes}
    try:
        manifest = json.loads((COHORT / "manifest.json").read_text(encoding="utf-8"))
        return {name: int(manifest[name]) for name in ("samples", "genes")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"samples": 1, "genes": 1}  # `prepare` reports a damaged cohort


def source_problem(source: Path) -> str | None:
    """Why DVC would stop at the source, or read more than it; None if it does neither."""
    if source == SYNTHETIC:
        return None  # DVC creates it
    if not source.exists():
        return f"{source} does not exist; expected {SOURCE_FORMATS}"
    if source.resolve() in (Path.cwd(), *Path.cwd().parents):
        return f"{source} contains this project; give the folder of the counts alone"
    if source.is_file() and source.suffix.lower() != ".h5ad":
        return f"{source} is neither; expected {SOURCE_FORMATS}"
    return None


def parse_assignment(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"{text}: expected KEY=VALUE, for example tune.trials=40")
    return name.strip(), yaml_file.parse_scalar(value)


def set_budget(search: str, trials: object) -> dict[str, object]:
    """Sets `trials` in the definition of the search, or returns the change of params.yaml if the
    definition has no `trials`."""
    if read_search_config(search, read_params(PARAMS)).trials is None:
        return {"tune.trials": trials}
    if trials is None:
        raise InputError(f"--budget {search}: trials is empty; expected a number")
    path = SEARCHES / f"{search}.yaml"
    document = yaml_file.read(path)
    try:
        SearchConfig.model_validate(document.values | {"trials": trials})
    except ValidationError as error:
        raise validation_error(error, SearchConfig, document) from None
    edit(path, {"trials": trials})
    return {}


def best_values(search: str) -> dict[str, object]:
    """The values of best.yaml. Raises InputError for keys that are not in the search space."""
    space = read_search_config(search, read_params(PARAMS)).space
    path = EXPERIMENTS / search / "best.yaml"
    if not path.exists():
        raise InputError(f"{path}: no such file; `make tune SEARCH={search}` writes it")
    document = yaml_file.read(path)
    values = flatten(document.values)
    problems = [
        f"{document.where(tuple(name.split('.')))}: {name} is not a key of the search; remove it"
        for name in values
        if name not in space
    ]
    if problems:
        raise InputError(*problems)
    return values


def set_params(changes: dict[str, object]) -> None:
    """Sets values of params.yaml. Raises InputError, and writes nothing, if one is invalid."""
    params = read_params(PARAMS)
    names = params.flat()
    unknown = [
        f"{PARAMS}: {name} is unknown{did_you_mean(name, names)}"
        for name in changes
        if name not in names
    ]
    if unknown:
        raise InputError(*unknown)
    try:
        params.override(changes)
    except ValidationError as error:
        document = yaml_file.read(PARAMS)
        raise validation_error(error, Params, document) from None
    edit(PARAMS, changes)


def edit(path: Path, changes: dict[str, object]) -> None:
    """Edits a YAML file and prints the difference."""
    before, after = (text.splitlines() for text in yaml_file.edit(path, changes))
    difference = list(difflib.unified_diff(before, after, str(path), str(path), n=0, lineterm=""))
    print("\n".join(difference) if difference else f"{path}: no change")


if __name__ == "__main__":
    exit_with(main)
