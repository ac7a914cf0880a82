"""The laws of the house: imports between rooms, homes of libraries, dependencies of stages."""

import ast
import re
import tomllib
from functools import cache
from graphlib import TopologicalSorter

import pytest
from support.settings import ROOT

from pipeline.gem.common import config, yaml_file
from pipeline.gem.common.code_version import import_closure

GEM = ROOT / "pipeline" / "gem"
VERBS = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")
CODE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*.py"))
STAGES = yaml_file.read(ROOT / "dvc.yaml").values["stages"]

# A room: the rooms that it may import, beside itself and `common`, the ground of all.
MAY_IMPORT = {
    "common": set(),
    "data": set(),
    "preparation": {"data"},
    "simulation": {"data"},
    "model": {"data"},
    "training": {"model", "data"},
    "prediction": {"model", "data"},
    "evaluation": {"model", "simulation", "data"},
    "tracking": {"training", "prediction", "model", "data"},
    "search": {"tracking", "training", "model", "data"},
}
# A library: the rooms or modules that may import it. All others are free.
LIBRARIES = {
    "mlflow": ("tracking", "prediction/mlflow_model"),
    "optuna": ("search",),
    "ruamel": ("common/yaml_file",),
    "yaml": (),  # its YAML 1.1 differs from that of DVC; tests read results with it
    "anndata": ("data", "prediction"),
    "safetensors": ("model/tensor_file",),
    "matplotlib": (
        "common/plotting",
        "training/learning_curves",
        "search/figures",
        "evaluation/report",
    ),
    "rich": ("evaluation/report/console",),
    "jinja2": ("evaluation/report/page",),
    "dvc": (),
    "importlib": ("common/code_version",),
}
LARGEST_ROOM = 13  # modules


@cache
def imports(file: str) -> set[str]:
    """Dotted names of all modules that a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room_of(file: str) -> str:
    return file.split("/")[2] if file.startswith("pipeline/gem/") and file.count("/") > 2 else ""


def rooms_imported(file: str) -> set[str]:
    parts = (name.split(".") for name in imports(file) if name.startswith("pipeline.gem."))
    return {part[2] for part in parts} & set(MAY_IMPORT)


def test_the_table_names_every_room_and_has_no_circle():
    rooms = {path.name for path in GEM.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)
    assert len(list(TopologicalSorter(MAY_IMPORT).static_order())) == len(MAY_IMPORT)


@pytest.mark.parametrize("file", [file for file in CODE if room_of(file)])
def test_a_room_imports_only_the_rooms_below_it(file):
    room = room_of(file)
    assert rooms_imported(file) <= MAY_IMPORT[room] | {room, "common"}


def test_modules_import_one_another_without_a_circle():
    graph = {}
    for file in CODE:
        names = {name.replace(".", "/") + ".py" for name in imports(file)}
        graph[file] = names & set(CODE)
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert sorted(order) == CODE


@pytest.mark.parametrize("file", CODE)
def test_verbs_are_imported_by_nobody(file):
    assert not {f"pipeline.{verb}" for verb in VERBS} & imports(file)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_stays_in_its_rooms(library):
    users = {file for file in CODE if library in {name.split(".")[0] for name in imports(file)}}
    allowed = tuple(f"pipeline/gem/{place}" for place in LIBRARIES[library])
    strangers = {file for file in users if not file.startswith(allowed)} if allowed else users
    assert not strangers
    assert not LIBRARIES[library] or users, f"nobody imports {library}: drop it from the table"


def test_no_import_hides_in_a_string():
    dotted = re.compile(r"""["']pipeline\.gem\.[a-z_.]+["']""")
    hidden = [
        f"{file}: {match[0]}"
        for file in CODE
        for match in dotted.finditer((ROOT / file).read_text(encoding="utf-8"))
        if match[0].count(".") > 1
    ]
    # Two entry points that another program imports by name: the code whose hash names a checkpoint,
    # and the module that MLflow loads.
    entries = {"training/checkpoint.py", "tracking/model_registry.py"}
    assert {line.split(":")[0].removeprefix("pipeline/gem/") for line in hidden} <= entries


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_training_and_search_cannot_reach_the_simulated_truth(verb):
    assert "simulation" not in {room_of(file) for file in import_closure(f"pipeline.{verb}")}


@pytest.mark.parametrize("room", ["model", "training", "simulation", "evaluation", "prediction"])
def test_mathematics_knows_no_tracker(room):
    files = [file for file in CODE if room_of(file) == room]
    assert not [file for file in files if "tracking" in rooms_imported(file)]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_is_small_and_states_its_purpose(room):
    folders = {path.parent for path in (GEM / room).rglob("*.py")}
    for folder in folders:
        assert (
            len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= LARGEST_ROOM
        )
        body = ast.parse((folder / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{folder}: one docstring, no code"


@pytest.mark.parametrize("file", CODE)
def test_a_module_states_its_purpose_and_has_at_most_400_lines(file):
    text = (ROOT / file).read_text()
    assert text.startswith('"""')
    assert text.count("\n") <= 400


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_states_how_it_is_run(verb):
    assert (
        f"python -m pipeline.{verb}"
        in (ROOT / "pipeline" / f"{verb}.py").read_text().split('"""')[1]
    )


def test_the_results_are_printed_without_the_model_and_the_trackers():
    """Each takes seconds to import."""
    names = {name for file in import_closure("pipeline.results") for name in imports(file)}
    assert not {name.split(".")[0] for name in names} & {"torch", "sklearn", "mlflow", "optuna"}


# What writes files, and the modules that may call it: into a new folder, a temporary file of
# `atomic_replacement`, or memory.
WRITERS = {
    "open": {"prediction/output_files"},
    "File": {"prediction/output_files"},
    "ParquetWriter": {"data/shards", "prediction/output_files"},
    "write_table": {"evaluation/run", "prediction/output_files"},
    "savefig": {"common/plotting"},
    "savez": {"simulation/truth"},
    "copyfile": {"preparation/prepare", "tracking/model_registry"},
    "copy": {"tracking/offline_buffer"},
    **{name: set() for name in ("write_text", "write_bytes", "to_csv", "to_parquet", "save_file")},
    **{name: set() for name in ("save", "savez_compressed", "copytree", "copy2", "move")},
}
LIBRARIES_OF_WRITERS = {"np", "pq", "h5py", "shutil", "torch", "figure"}


def writes(call: ast.Call) -> str | None:
    """The name in WRITERS of a call that writes a file."""
    function, values = call.func, ast.walk(call)
    modes = {str(node.value) for node in values if isinstance(node, ast.Constant)}
    name = getattr(function, "attr", getattr(function, "id", None))
    if name in ("open", "File"):
        return name if modes & {"w", "a", "x", "wb", "ab", "xb", "w+b", "r+b", "r+"} else None
    if name in ("save", "write_table", "savez", "copy", "copytree", "move"):
        owner = getattr(getattr(function, "value", None), "id", None)
        return name if owner in LIBRARIES_OF_WRITERS else None
    return name if name in WRITERS else None


def test_files_are_written_through_one_module():
    """common/files.py replaces a file by rename: nothing is written through a link."""
    wrong = []
    for file in CODE:
        module = file.removeprefix("pipeline/gem/").removesuffix(".py")
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            name = writes(node) if isinstance(node, ast.Call) else None
            if name and module != "common/files" and module not in WRITERS[name]:
                wrong.append(f"{file}:{node.lineno}: {name}")
    assert not wrong


PRIVATE_WORDS = "said|asked|told|claims|scenes|closeups|seen|heard|spoken|carried"


def test_no_identifier_is_a_word_of_the_private_vocabulary():
    found = []
    for file in CODE:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            for field in ("id", "attr", "arg", "name"):
                name = getattr(node, field, None)
                if isinstance(name, str) and re.fullmatch(PRIVATE_WORDS, name):
                    found.append(f"{file}: {name}")
    assert not found


# dvc.yaml


def rooms_of_stage(stage: str) -> set[str]:
    prefix = "pipeline/gem/"
    return {dep.removeprefix(prefix) for dep in STAGES[stage]["deps"] if dep.startswith(prefix)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_script_and_on_every_room_that_it_imports(stage):
    module = re.match(r"python -m (\S+)", STAGES[stage]["cmd"])[1]
    script = module.replace(".", "/") + ".py"
    assert script in STAGES[stage]["deps"]
    assert rooms_of_stage(stage) == {room_of(file) for file in import_closure(module)} - {""}


def test_dvc_yaml_is_short():
    assert (ROOT / "dvc.yaml").read_text().count("\n") < 130


def test_python_caches_are_no_change_for_dvc():
    assert "__pycache__" in (ROOT / ".dvcignore").read_text()


def test_only_evaluation_and_registration_depend_on_the_models():
    models = {f"experiments/{name}/model.safetensors" for name in ("default", "${evaluate.search}")}
    for stage, content in STAGES.items():
        deps = {dep for dep in content["deps"] if dep.startswith("experiments/")}
        if stage in ("evaluate", "register"):
            assert models <= deps
        else:
            assert all(dep.startswith("experiments/searches/") for dep in deps)


def test_outputs_that_dvc_does_not_cache_are_in_git_or_ignored_by_hand():
    """DVC itself ignores what it caches."""
    outputs = [output for stage in STAGES.values() for output in stage.get("outs", ())]
    uncached = [name for output in outputs if isinstance(output, dict) for name in output]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert set(uncached) == {"experiments/evaluation/predictions", "experiments/registered.json"}
    assert {f"/{name}" for name in uncached} <= set(ignored)


def test_every_section_of_params_is_a_dependency_of_some_stage():
    sections = {
        str(name).split(".")[0] for stage in STAGES.values() for name in stage.get("params", ())
    }
    assert sections == set(config.read_params(ROOT / "params.yaml").model_dump()) - {"tracking"}


# Configuration and lock file


def test_there_is_no_second_default_for_a_value_of_params():
    models = [
        model
        for model in vars(config).values()
        if isinstance(model, type) and issubclass(model, config.Frozen)
    ]
    assert len(models) > 10
    optional = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.is_required()
    ]
    # An option of a covariate changes nothing where it is left out. An embedding has either key.
    expected = {"min_count", "Embedding.table", "Embedding.tables"}
    assert {name if "table" in name else name.partition(".")[2] for name in optional} == expected


def declared_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return {re.match(r"[A-Za-z0-9_.-]+", package)[0].lower() for package in packages}


def test_the_lock_file_pins_every_declared_dependency():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?==", lock, flags=re.MULTILINE))
    names = {re.sub(r"[_.]", "-", name) for name in declared_packages()}
    assert names - {"torch"} <= pinned  # torch has a line of its own in the Makefile


def test_declared_libraries_are_imported():
    files = [*CODE, *(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))]
    used = {name.split(".")[0] for file in files for name in imports(file)}
    module = {"scikit-learn": "sklearn", "ruamel.yaml": "ruamel"}
    # Commands, database drivers, samplers, and what the tests use.
    indirect = {"dvc", "cmaes", "greenlet", "optuna-dashboard", "psycopg", "pyyaml"}
    tests = {"pytest", "pytest-xdist", "ruff"}
    assert {module.get(name, name) for name in declared_packages() - indirect - tests} <= used
