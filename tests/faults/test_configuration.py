"""Every key of a search, whatever is written there: a search that can run, or one line."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
from support.mutations import assert_one_line_each, mutations, removals
from support.settings import ROOT

from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import Params, read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.search.search_config import SEARCHES, SearchConfig, read_search_config

FOLDER = ROOT / SEARCHES
PATHS = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def params() -> Params:
    return read_params(ROOT / "params.yaml")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def document(request, monkeypatch) -> yaml_file.Document:
    """The definition of a search; a change of its values is read as a change of the file."""
    original = yaml_file.read(request.param)
    changed = replace(original, values=deepcopy(original.values))
    monkeypatch.setattr(yaml_file, "read", lambda path: changed)
    return changed


def check_runnable(config: SearchConfig, params: Params) -> None:
    """AssertionError unless every value that a trial may have is finite and one of params.yaml."""
    corners = [{}, {}]
    for name, space in config.space.items():
        values = getattr(space, "choices", None) or (space.low, space.high)
        for value in (*values, config.baseline_values[name]):
            assert not isinstance(value, float) or math.isfinite(value)
            params.override({name: value})
        if space.values():
            assert len(set(space.values())) == len(space.values()) > 1
        corners = [corners[0] | {name: values[0]}, corners[1] | {name: space.high}]
    for corner in corners:
        params.override(corner)
    for number in (config.epochs, config.trials or 1, config.time_limit or 1, config.confirm.top):
        assert 0 < number <= 10**6
    assert not set(config.seeds) & set(config.confirm.seeds)


def test_every_value_of_every_key_makes_a_search_that_can_run_or_is_refused_in_one_line(
    document, params, times, record_property
):
    refused = accepted = 0
    for key, value in mutations(document.values, step=max(1, 20 // times)):
        try:
            config = read_search_config(document.path.stem, params, FOLDER)
        except InputError as error:
            assert_one_line_each(error.problems, document.path)
            refused += 1
        else:
            accepted += 1
            try:
                check_runnable(config, params)
            except Exception as error:
                pytest.fail(f"{key}: {value!r:.60} is accepted: {error}")
    assert refused > 2 * accepted > 0
    record_property(
        "figure", f"{refused} mutations refused in one line, {accepted} that can run accepted"
    )


@pytest.mark.parametrize("change", ["absent", "misspelt"])
def test_an_absent_or_misspelt_key_is_one_line_with_the_right_name(document, params, change):
    optional = ("trials", "time_limit", "when", "epochs", "step")
    for key in removals(document.values, change):
        name = key[-1]
        if (name in optional and key != ("epochs",)) or "when" in key:
            continue
        with pytest.raises(InputError) as caught:
            read_search_config(document.path.stem, params, FOLDER)
        assert_one_line_each(caught.value.problems, document.path)
        assert any(name in problem for problem in caught.value.problems), caught.value.problems
