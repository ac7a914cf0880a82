"""The page: one valid file without a link to the outside, whose numbers are those of the tables and whose sentences claim no more."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline import evaluate as stage
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.comparison import nested
from pipeline.gem.evaluation.error_decomposition import PARTS
from pipeline.gem.evaluation.report import page
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

VOID = {"meta", "br", "img", "input", "hr", "link"}


@pytest.fixture(scope="module")
def models(cohort, params) -> dict:
    data = TrainingData.load(cohort, torch.device("cpu"))
    first, second = (fit(data, params, seed).gem for seed in (1, 2))
    return {"gem": [first, second], "gem_tuned": [second]}


def evaluated(folder: Path, cohort: Cohort, models: dict, params) -> tuple[str, stage.Evaluation]:
    """(the report, what it is made of) of a real evaluation in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seeds = {name: list(range(1, len(several) + 1)) for name, several in models.items()}
        found = stage.evaluate(cohort, models, seeds, params)
        stage.write_results(found, cohort, params)
        return (folder / stage.REPORT).read_text(encoding="utf-8"), found


@pytest.fixture(scope="module")
def synthetic(cohort, models, params, tmp_path_factory) -> tuple[str, stage.Evaluation, Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    return *evaluated(folder, cohort, models, params), folder


@pytest.fixture(scope="module")
def measured(cohort, models, params, tmp_path_factory) -> tuple[str, stage.Evaluation]:
    """As of a real cohort: no truth, no controls, one model."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(cohort.folder, folder / "cohort")
    shutil.rmtree(folder / "cohort" / "truth")
    plain = Cohort(folder / "cohort")
    plain.declared = plain.declared.model_copy(update={"control": None})
    return evaluated(folder, plain, {"gem": models["gem"][:1]}, params)


class Page(HTMLParser):
    """Tags in balance, ids, links, and the numbers of the score tables."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict] = []
        self.scores: dict[tuple[str, str, str, str], float | None] = {}
        self.split = self.table = self.cell = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag == "table":
            self.split, self.table = given.get("data-split"), given.get("class")
        if tag == "td":
            self.cell = (
                (self.table, self.split, given["data-predictor"], given["data-metric"])
                if "data-metric" in given
                else None
            )
            if self.cell:
                self.scores[self.cell] = None
        if tag == "data" and self.cell:
            self.scores[self.cell] = float(given["value"])

    def handle_startendtag(self, tag, attributes):
        """SVG's own way to close: `<line/>`."""

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.open and self.open[-1] == tag, (
            f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        )
        self.open.pop()


@pytest.mark.parametrize("which", ["synthetic", "measured"])
def test_the_page_is_one_valid_file_that_opens_offline(which, request):
    text = request.getfixturevalue(which)[0]
    document = Page(text)
    assert text.startswith("<!DOCTYPE html>") and document.open == []
    assert len(document.ids) == len(set(document.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in document.links)
    assert {link[1:] for link in document.links if link.startswith("#")} <= set(document.ids)
    assert not re.findall(r"https?:|//cdn|@import|url\(", text)
    assert "<script" not in text
    assert all(len(image["alt"]) > 20 for image in document.images)
    assert not re.findall(
        r"\b(nan|NaN|None|inf)\b",
        re.sub(r"<details>.*?</details>|data:image[^\"]*|<pre.*?</pre>", "", text, flags=re.DOTALL),
    )
    assert len(text) < 4_000_000


@pytest.mark.parametrize("which", ["synthetic", "measured"])
def test_its_numbers_are_those_of_the_tables(which, request):
    text, found = request.getfixturevalue(which)[:2]
    scores, shown = found.tables["scores"], Page(text).scores
    every = {
        ("all", *key)
        for key in zip(scores["split"], scores["predictor"], scores["metric"], strict=True)
    }
    assert every == {key for key in shown if key[0] == "all"}
    assert len(shown) > len(every)
    known = scores.set_index(["split", "predictor", "metric"])["value"]
    for (_, *key), value in shown.items():
        if pd.isna(known[tuple(key)]):
            assert value is None
        else:
            assert value == known[tuple(key)]


def test_a_number_that_is_missing_says_why(synthetic):
    text, found, _ = synthetic
    reasons = found.tables["scores"].loc[found.tables["scores"]["value"].isna(), "reason"]
    assert len(reasons)
    for reason in reasons.unique():
        assert reason in html.unescape(text)


def test_the_same_evaluation_gives_the_same_bytes_whatever_lay_there(
    synthetic, cohort, models, params, tmp_path
):
    text, found, folder = synthetic
    (tmp_path / stage.OUTPUT / "figures").mkdir(parents=True)
    (tmp_path / stage.OUTPUT / "figures" / "of_an_earlier_evaluation.png").write_bytes(b"")
    again, _ = evaluated(tmp_path, cohort, models, params)
    written = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    assert written == {
        path.relative_to(tmp_path).as_posix(): path.read_bytes()
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file()
    }
    assert again == text
    figures = {
        "mse.png",
        "skill.png",
        "delta_pearson.png",
        "discrimination.png",
        "calibration.png",
        "credibility.png",
    }
    predictions = {f"{split}.parquet" for split in found.tables["scores"]["split"]}
    names = {
        "report.html",
        "metrics.json",
        "credibility.csv",
        *stage.FILE_OF.values(),
        *figures,
        *predictions,
    }
    assert names == {name.rsplit("/", 1)[1] for name in written}


def test_the_code_that_is_shown_gives_the_number_that_is_shown(synthetic):
    text, found, folder = synthetic
    code = html.unescape(re.search(r'<pre id="recompute">(.*?)</pre>', text, flags=re.DOTALL)[1])
    assert "pipeline" not in code and len(code.splitlines()) <= 13
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    scores = (
        found.tables["scores"]
        .query("split == 'test_combination' and metric == 'mse'")
        .set_index("predictor")["value"]
    )
    printed = {line.split()[0]: float(line.split()[-1]) for line in said.splitlines()}
    assert list(printed) == ["ridge", "gem", "gem_tuned"]
    for name, value in printed.items():
        assert value == pytest.approx(scores[name], rel=1e-5)


def test_everything_that_the_issue_asks_for_is_on_the_page(synthetic, cohort, params):
    text, found, _ = synthetic
    document = Page(text)
    splits = list(found.tables["scores"]["split"].unique())
    assert {
        "verdicts",
        *splits,
        "seeds",
        "calibration",
        "latents",
        "regret",
        "credibility",
        "origin",
    } <= set(document.ids)
    assert html.escape(page.PROMISE) in text and "interrupted" not in text
    assert cohort.train_validation_sha256[:32] in text and torch.__version__ in text
    for name, value in params.flat("model", "train", "data", "splits", "synthesize").items():
        assert (
            name.split(".", 1)[1] in text
            and html.escape(str(value)).replace("&#x27;", "&#39;") in text
        )
    assert text.count('class="panel"') >= 2 * 2 * len(splits) + 9 * 2
    assert len(document.images) == 1


def test_every_label_head_is_shown_beside_the_commonest_class_with_its_calibration_error(synthetic):
    text, found, _ = synthetic
    latents = found.tables["latents"].query("predictor == 'gem'")
    table = text[text.index('aria-label="Label heads"') :]
    table = table[: table.index("</table>")]
    for row in latents[latents["measure"] == "accuracy"].itertuples():
        error = latents.query("measure == 'calibration_error' and covariate == @row.covariate")[
            "value"
        ].item()
        shown = re.search(
            rf'scope="row">{row.covariate}</th><td class="name">gem</td>.*?</tr>',
            table,
            flags=re.DOTALL,
        )[0]
        for value, metric in ((row.value, None), (row.chance, None), (error, "calibration")):
            assert f'<td class="n">{page.number(value, metric)}</td>' in shown


def test_without_truth_a_replicate_is_the_ceiling_and_what_needs_the_truth_is_left_out(measured):
    text, found = measured
    document = Page(text)
    assert not {"regret", "credibility"} & set(document.ids)
    assert document.images == []
    assert "1 ideal" not in text
    known = (
        found.tables["scores"]
        .query("predictor == 'gem' and metric == 'skill_replicate'")
        .set_index("split")["value"]
    )
    for split, value in known.items():
        place = re.search(
            rf'<h2><a href="#{split}">{split}</a>.*?<p>(.*?)</p>', text, flags=re.DOTALL
        )[1]
        assert ("cannot be given" in place) == pd.isna(value)
        assert "replicate" in place


def test_one_model_with_one_seed_is_compared_with_the_baselines_and_has_no_spread(measured):
    text, found = measured
    assert set(found.tables["comparisons"]["predictor"]) == {"gem"}
    table = text[text.index('aria-label="Seeds"') : text.index('id="calibration"')]
    assert "0." in table and " ± " not in table


def test_values_from_a_cohort_cannot_break_the_page(synthetic):
    _, found, _ = synthetic
    strange = replace(found.conditions[0], name='<script>alert("x")</script>')
    contents = page.Contents(
        found.tables,
        found.seeds,
        [strange],
        [],
        [],
        {"summary": "<b>"},
        {"commit": "a & b"},
        {"model": {"x": "<i>"}},
        "1 < 2",
        None,
    )
    text = page.render(contents)
    assert "<script" not in text and "<b>.</b>" not in text and Page(text).open == []


@pytest.mark.parametrize(
    ("value", "metric", "shown"),
    [
        (0.04512, "mse", "0.0451"),
        (-0.00001, "mse", "0.0000"),
        (-1.234, "skill", "−1.23"),
        (0.12345, "calibration", "0.123"),
        (None, "mse", "–"),
        (float("nan"), "skill", "–"),
    ],
)
def test_a_number_has_as_many_digits_as_a_reader_compares(value, metric, shown):
    assert page.number(value, metric) == shown


def test_the_largest_part_to_act_on_is_named():
    said = page.regret_sentence(
        "gem",
        {"count noise": 0.02, "seeds": 0.001, "by study": 0.009, "by pair": 0.03, "chance": 0.0},
    )
    assert "mse of 0.0600, 33 % is chance or out of reach" in said
    assert said.endswith("by pair (0.0300, 50 %).")


def test_every_part_of_the_regret_comes_with_advice():
    assert tuple(page.ADVICE) == PARTS


def test_metrics_json_is_the_table(synthetic):
    _, found, folder = synthetic
    assert json.loads((folder / stage.OUTPUT / "metrics.json").read_text()) == nested(
        found.tables["scores"]
    )
