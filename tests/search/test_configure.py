"""The verb configure writes valid values and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.settings import ROOT

from pipeline import configure
from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.common.yaml_file import flatten

BEST = Path("experiments/latent_kl/best.yaml")
CAPACITY = Path("experiments/searches/capacity.yaml")
PARAMS = Path("params.yaml")


@pytest.fixture(autouse=True)
def _repository(tmp_path, monkeypatch):
    """A working directory with the committed params.yaml and searches."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / PARAMS, PARAMS)
    shutil.copytree(ROOT / "experiments" / "searches", "experiments/searches")
    BEST.parent.mkdir()
    Path(".git").mkdir()


@pytest.fixture
def call(monkeypatch, capsys):
    """A function: runs the verb with arguments and returns its output."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["configure", *arguments])
        configure.main()
        return capsys.readouterr().out

    return run


def test_a_valid_repository_has_no_output(call):
    assert call() == ""


def test_set_changes_the_values_keeps_comments_and_prints_the_difference(call):
    before = PARAMS.read_text()
    output = call("--set", "tune.trials=40", "--set", "train.learning_rate=1e-3")
    after = PARAMS.read_text()
    expected = re.sub(r"trials: \d+", "trials: 40", before)
    assert after == re.sub(r"learning_rate: \S+", "learning_rate: 0.001", expected)
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    changes = [line for old, new in pairs if old != new for line in (f"-{old}", f"+{new}")]
    assert re.findall(r"^[-+](?!-- |\+\+ ).*", output, re.M) == changes


def test_set_to_the_current_value_writes_nothing(call):
    time = PARAMS.stat().st_mtime_ns
    assert call("--set", "tune.trials=12") == "params.yaml: no change\n"
    assert PARAMS.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["tune.trials=0"], "tune.trials"),
        (["tune.trials=many"], "tune.trials"),
        (["tune.trials=4.5"], "tune.trials"),
        (["tune.trials="], "tune.trials"),
        (["tune.trial=4"], "did you mean tune.trials?"),
        (["tune=4"], "tune is unknown"),
        (["tune.trials.more=4"], "did you mean tune.trials?"),
        (["tune.trials"], "expected KEY=VALUE"),
        (["=4"], "unknown"),
        (["train.learning_rate=.inf"], "train.learning_rate"),
        (["model.latent.technical=[4]"], "model.latent.technical"),
        (["model.dropout={a: 1}"], "model.dropout"),
        (["splits.seed=\x07"], "splits.seed"),
        (["synthesize.perturbations_per_study=81"], "(81) is more than perturbations (80)"),
        (["tune.trials=40", "train.epochs=0"], "train.epochs"),
        (["tune.trials=40", "tune.trials=41"], "appears twice"),
        (["train.learning_rate=1e308"], "train.learning_rate is 1e+308; expected less than"),
        (["train.learning_rate=" + "9" * 5000], "train.learning_rate"),
        (["data.source=" + "x" * 10_000], "expected at most 1000 characters"),
        (["x" * 10_000 + "=4"], "is unknown"),
        (["data.source=~/x.h5ad"], "only a shell expands ~ and $NAME; write the whole path"),
        (["train.seeds=[1, 1]"], "1 appears twice; remove one"),
    ],
)
def test_set_refuses_invalid_values_and_leaves_the_file(call, assignments, expected):
    before = PARAMS.read_bytes()
    with pytest.raises(GemError, match=re.escape(expected)) as caught:
        call(*(f"--set={assignment}" for assignment in assignments))
    assert all("\n" not in problem for problem in caught.value.problems)
    assert PARAMS.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("data.control.value", "not treated", "not treated"),
        ("data.control.value", "DMSO, 0.1%", "DMSO, 0.1%"),
        ("data.layer", "raw", "raw"),
        ("data.layer", "'1e3'", "1e3"),
        ("data.date_column", "null", None),
        ("model.additive_technical", "false", False),
        ("train.seeds", "[1, 2]", [1, 2]),
    ],
)
def test_a_value_that_was_set_reads_back(call, name, text, value):
    call("--set", f"{name}={text}")
    assert read_params(PARAMS).flat()[name] == value


def test_the_budget_is_set_in_the_search_if_that_has_one(call):
    search, params = CAPACITY.read_text(), PARAMS.read_text()
    output = call("--budget", "capacity=80")
    assert "-trials: 40" in output and "+trials: 80" in output
    assert CAPACITY.read_text() == search.replace("trials: 40", "trials: 80")
    assert PARAMS.read_text() == params
    assert "+  trials: 7" in call("--budget", "latent_kl=7")
    assert read_params(PARAMS).tune.trials == 7


BUDGETS = ["", "0", "many", "true", "4.5", "1e308", ".nan", "[4]", "{a: 1}", "null", "9" * 5000]


@pytest.mark.parametrize("trials", BUDGETS, ids=lambda text: text[:8])
@pytest.mark.parametrize("search", ["capacity", "latent_kl"])
def test_an_invalid_budget_is_refused_in_one_line(call, search, trials):
    before = CAPACITY.read_bytes(), PARAMS.read_bytes()
    with pytest.raises(InputError, match="trials") as caught:
        call("--budget", f"{search}={trials}")
    assert all(len(problem) <= 300 for problem in caught.value.problems)
    assert before == (CAPACITY.read_bytes(), PARAMS.read_bytes())


@pytest.mark.parametrize("budget", ["capacity", "=4", "../x=4", "no_search=4", "x" * 5000 + "=4"])
def test_a_budget_of_no_search_is_refused(call, budget):
    with pytest.raises(InputError):
        call("--budget", budget)


def test_a_list_that_dvc_wrote_in_several_lines_can_be_set(call):
    text = PARAMS.read_text()
    lines = "  seeds:                       # one model per seed\n  - 1\n  - 2\n"
    PARAMS.write_text(re.sub(r"  seeds: \[1\].*\n", lines, text))
    assert read_params(PARAMS).train.seeds == (1, 2)
    call("--set", "train.seeds=[3]")
    assert "  seeds: [3]  # one model per seed\n" in PARAMS.read_text()
    assert read_params(PARAMS).train.seeds == (3,)


def test_promote_changes_exactly_the_searched_keys(call):
    best = {
        "model": {"latent": {"technical": 5, "biological": 33, "perturbation": 64}},
        "train": {"kl_weight": {"technical": 1e-2, "biological": 0.5, "perturbation": 4.0}},
    }
    BEST.write_text(yaml_file.dump(best))
    before = read_params(PARAMS).flat()
    output = call("--promote", "latent_kl")
    assert read_params(PARAMS).flat() == before | flatten(best)
    assert sum(line.startswith("+ ") for line in output.splitlines()) == 6


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (None, "best.yaml: no such file; `make tune SEARCH=latent_kl` writes it"),
        ("train: {epochs: 1}\n", "best.yaml:1: train.epochs is not a key of the search"),
    ],
)
def test_promote_refuses_a_missing_result_and_keys_that_were_not_searched(call, best, expected):
    if best:
        BEST.write_text(best)
    before = PARAMS.read_bytes()
    with pytest.raises(InputError, match=re.escape(expected)):
        call("--promote", "latent_kl")
    assert PARAMS.read_bytes() == before


def test_problems_of_searches_and_of_the_place_are_reported_together(call):
    Path(".git").rmdir()
    CAPACITY.write_text(CAPACITY.read_text().replace("low: 0.0,", "low: -1.0,"))
    text = PARAMS.read_text()
    PARAMS.write_text(text.replace("source: data/synthetic ", "source: elsewhere.h5ad "))
    with pytest.raises(InputError) as caught:
        call()
    repository, search, source = caught.value.problems
    assert "not a git repository, which DVC needs; run `git init`" in repository
    assert search.startswith("experiments/searches/capacity.yaml:")
    assert re.search(r"params.yaml:\d+: data.source: elsewhere.h5ad does not exist", source)


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        (CAPACITY, "[64, 128, 256, 512]", "[256, 65536]", "model.hidden (65536)"),
        (CAPACITY, "high: 3, log", "high: 1000, log", "model.blocks (1000)"),
        (CAPACITY, "trials: 40", "trials: 1000000", "tune.trials (1000000)"),
        (PARAMS, "hidden: 256", "hidden: 65536", "model.hidden (65536)"),
        (PARAMS, "samples: 12000", "samples: 1000000000", "synthesize.samples (1000000000)"),
    ],
)
def test_the_largest_trial_and_every_stage_must_fit_the_machine(call, path, old, new, expected):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        call()
    for problem in caught.value.problems:
        assert re.search(r"(GB of memory|days); .*lower ", problem) and len(problem) <= 300
    assert any(
        problem.startswith(f"{path}:") and expected in problem for problem in caught.value.problems
    )


@pytest.mark.parametrize("value", ["true", "True"])
def test_without_git_dvc_needs_a_setting(call, value):
    Path(".git").rmdir()
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text(f"[core]\n    analytics = false\n    no_scm = {value}\n")
    assert call() == ""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("._latent_kl.yaml", None),
        (".#latent_kl.yaml", None),
        ("latent_kl.yaml~", None),
        (".ipynb_checkpoints/latent_kl-checkpoint.yaml", None),
        (".DS_Store", None),
        ("notes.txt", None),
        ("latent_kl copy.yaml", "latent_kl copy.yaml: a search has a name of letters, digits"),
        ("latent-kl.yaml", "latent-kl.yaml: a search has a name of letters, digits"),
        ("latent_kl2.yml", "latent_kl2.yml: a search has a name of letters, digits"),
    ],
)
def test_what_file_managers_and_editors_leave_is_no_search(call, name, problem):
    path = CAPACITY.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    if problem is None:
        assert call() == ""
        return
    with pytest.raises(InputError) as caught:
        call()
    (line,) = caught.value.problems
    assert line.startswith(f"experiments/searches/{problem}")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("counts.h5ad", None),
        ("COUNTS.H5AD", None),
        ("folder", None),
        ("x.loom", "x.loom is neither; expected a folder of Parquet files, or an .h5ad file"),
        ("x.h5ad.gz", "x.h5ad.gz is neither"),
        (".", ". contains this project; give the folder of the counts alone"),
        ("/", "/ contains this project"),
    ],
)
def test_a_source_is_a_folder_or_an_h5ad_beside_the_project(call, source, problem):
    if source == "folder":
        Path(source).mkdir()
    elif "." in source[1:]:
        Path(source).touch()
    if problem is None:
        call("--set", f"data.source={source}")
        assert call() == ""
        return
    call("--set", f"data.source={source}")
    with pytest.raises(InputError) as caught:
        call()
    assert problem in str(caught.value)


def test_a_reserved_name_of_a_column_is_refused(call):
    PARAMS.write_text(PARAMS.read_text().replace("platform: {", "draw: {"))
    message = "data: no column can be called draw: .*rename it in the source"
    with pytest.raises(InputError, match=message):
        call()


def test_bad_input_exits_with_code_2_and_one_line():
    process = subprocess.run(
        [sys.executable, "-m", "pipeline.configure", "--set", "tune.trials=x"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and not process.stdout
    assert re.fullmatch(r"error: params.yaml:.*\n", process.stderr)
