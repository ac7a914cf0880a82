"""The laws of the house: who imports whom, and that dvc.yaml says what the code does."""

import re
from pathlib import Path

import pytest
from support.closure import files_read

from pipeline.gem.common import yaml_file
from pipeline.gem.common.code_version import ROOT, import_closure, imported
from pipeline.gem.common.config import read_params
from pipeline.gem.search.search_config import read_search_config

VERBS = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")
NOUNS = sorted(
    path.stem for path in (ROOT / "pipeline" / "gem").glob("*.py") if path.stem != "__init__"
)
STAGES = yaml_file.read(ROOT / "dvc.yaml").values["stages"]
CODE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*.py"))


def packages_of(file: str) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("noun", NOUNS)
def test_no_noun_imports_a_verb(noun):
    assert not {f"pipeline.{verb}" for verb in VERBS} & imported(f"pipeline/gem/{noun}.py")


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_a_verb(verb):
    assert not {f"pipeline.{other}" for other in VERBS} & imported(f"pipeline/{verb}.py")


def test_mlflow_is_known_to_the_tracking_and_to_what_it_loads_itself():
    assert [file for file in CODE if "mlflow" in packages_of(file)] == [
        f"pipeline/gem/{name}.py" for name in ("mlflow_store", "registry", "served")
    ]
    assert not [
        file for file in CODE if "pipeline.gem.prediction.mlflow_model" in imported(file)
    ], "it is found by name, so that a fit does not depend on it"


@pytest.mark.parametrize(
    ("library", "home"),
    [("yaml", "yamlfile"), ("anndata", "sources"), ("rich", "tables"), ("jinja2", "report")],
)
def test_a_library_is_imported_in_one_place_only(library, home):
    assert [file for file in CODE if library in packages_of(file)] == [f"pipeline/gem/{home}.py"]


def test_optuna_is_known_by_the_modules_of_the_search_only():
    assert [file for file in CODE if "optuna" in packages_of(file)] == [
        f"pipeline/gem/{name}.py"
        for name in ("claims", "importance", "samplers", "search", "study_storage")
    ]


def test_drawing_is_done_by_modules_of_figures_only():
    drawing = [file for file in CODE if "matplotlib" in packages_of(file)]
    assert drawing and all("figure" in Path(file).stem for file in drawing), drawing


def test_dvc_is_imported_nowhere():
    assert not [file for file in CODE if "dvc" in packages_of(file)]


@pytest.mark.parametrize(
    "noun",
    [
        "model",
        "likelihood",
        "training",
        "trained",
        "metrics",
        "baselines",
        "oracle",
        "simulator",
        "evaluation",
        "scoring",
    ],
)
def test_mathematics_knows_no_tracker(noun):
    assert not {"pipeline/gem/tracking/runs.py", "pipeline/gem/tracking/mlflow_client.py"} & set(
        import_closure(f"pipeline.gem.{noun}")
    )


def test_training_and_search_cannot_reach_the_simulated_truth():
    for module in ("pipeline.train", "pipeline.tune"):
        assert not {
            "pipeline/gem/simulation/generator.py",
            "pipeline/gem/simulation/oracle.py",
            "pipeline/gem/simulation/hidden_factors.py",
        } & set(import_closure(module))


def test_only_the_evaluation_depends_on_the_models():
    for stage in ("train", "tune"):
        assert not [
            dependency
            for dependency in STAGES[stage]["deps"]
            if dependency.startswith("experiments/") and not dependency.endswith(".yaml")
        ]
    wanted = {
        f"experiments/{name}/{part}"
        for name in ("default", "${evaluate.search}")
        for part in ("model.pt", "seeds")
    }
    assert wanted <= set(STAGES["evaluate"]["deps"])


def test_outputs_that_dvc_does_not_cache_are_in_git_or_ignored_by_hand():
    """DVC ignores what it caches; predictions are neither cached nor committed, because the models rebuild them."""
    outputs = [
        output
        for stage in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for output in stage.get(kind, ())
    ]
    uncached = [
        name
        for output in outputs
        if isinstance(output, dict)
        for name, how in output.items()
        if not how.get("cache", True)
    ]
    folders = [name for name in uncached if not Path(name).suffix]
    assert folders == ["experiments/evaluation/predictions"]
    assert f"/{folders[0]}" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_lists_the_modules_it_really_imports_and_the_files_these_read(stage):
    module = re.match(r"python -m (\S+)", STAGES[stage]["cmd"])[1]
    listed = [
        dependency for dependency in STAGES[stage]["deps"] if dependency.startswith("pipeline/")
    ]
    modules = import_closure(module)
    assert listed == sorted([*modules, *files_read(modules)])


def test_a_file_that_a_module_names_is_found():
    """Otherwise a changed template would change no stage."""
    assert files_read(
        ["pipeline/gem/evaluation/report/page.py", "pipeline/gem/evaluation/report/realism.py"]
    ) == ["pipeline/gem/realism_real.json", "pipeline/gem/page.html.jinja"]
    beside = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pipeline").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert set(files_read(CODE)) == beside, "a file that no module reads"


def test_the_search_depends_on_every_parameter_of_a_fit_but_the_searched_ones():
    params = read_params(ROOT / "params.yaml")
    searched = read_search_config("latent_kl", params, ROOT / "experiments" / "searches").space
    assert set(STAGES["tune"]["params"]) == {"tune.trials", *params.flat("model", "train")} - set(
        searched
    )


def test_every_section_of_params_is_read_by_some_stage():
    sections = {str(name).split(".")[0] for stage in STAGES.values() for name in stage["params"]}
    assert sections == set(read_params(ROOT / "params.yaml").model_dump()) - {"tracking"}


def test_there_is_no_second_default_for_a_value_of_params():
    from pipeline.gem.common import config

    models = [
        model
        for model in vars(config).values()
        if isinstance(model, type) and issubclass(model, config.Frozen)
    ]
    assert len(models) > 10
    assert [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.is_required()
    ] == []


@pytest.mark.parametrize("file", CODE)
def test_every_module_says_what_it_is(file):
    assert (ROOT / file).read_text().startswith('"""')


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_how_it_is_run(verb):
    assert (
        f"python -m pipeline.{verb}"
        in (ROOT / "pipeline" / f"{verb}.py").read_text().split('"""')[1]
    )


def test_lock_file_pins_every_declared_dependency():
    declared = re.findall(
        r'^    "([A-Za-z0-9_.-]+)', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
    )
    locked = set(
        re.findall(
            r"^([a-z0-9-]+)==", Path(ROOT / "requirements.lock").read_text(), flags=re.MULTILINE
        )
    )
    assert {name.lower().replace("_", "-") for name in declared} - {
        "torch",
        "error",
        "ignore",
    } <= locked
