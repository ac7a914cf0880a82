"""The report: one valid HTML file, offline, with the numbers of the tables."""

import html
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.catalogue import SHARED_CONTROLS, TABLE_FILES
from pipeline.gem.evaluation.error_decomposition import PARTS
from pipeline.gem.evaluation.report import page
from pipeline.gem.evaluation.report.contents import ReportData, report_data
from pipeline.gem.evaluation.report.landscape import FILES, Landscape, positions
from pipeline.gem.evaluation.report.summary import SHARED_NOTE
from pipeline.gem.evaluation.run import Evaluation, evaluate_models, write_tables
from pipeline.gem.model.gem import TrainedGEM

OUTPUT = Path("experiments/evaluation")
REPORT = OUTPUT / "report.html"
VOID = {"meta", "br", "img", "input", "hr", "link"}
SEARCH_TABLES = {
    "trials": "trial,state,value,epochs,win_rate,model.hidden,model.observation\n"
    "0,complete,5.5,4,0.6,4,normal\n1,complete,7.25,4,1.0,32,normal\n"
    "2,pruned,-9.0,2,0.0,1,multinomial\n3,failed,,1,,8,normal\n",
    "importance": "parameter,ped_anova,fanova\nmodel.hidden,0.75,0.5\nmodel.observation,,\n",
    "confirmed": "trial,seed,mse\n0,2,1.5\n0,3,2.5\n1,2,4.0\n1,3,\n",
}
SEEDS = {"gem": [1, 2], "gem_tuned": [2]}


class Report(NamedTuple):
    folder: Path  # the working directory of the evaluation
    data: ReportData
    text: str

    def table(self, name: str) -> pd.DataFrame:
        return self.data.evaluation.tables[name]


@pytest.fixture(scope="module")
def models(model_directory) -> dict[str, list[TrainedGEM]]:
    first, second = TrainedGEM.load_seeds(model_directory)[0]
    return {"gem": [first, second], "gem_tuned": [second]}


def write_search(folder: Path) -> Landscape:
    """A search of four trials."""
    folder.mkdir()
    (folder / "best.yaml").write_text("# the baseline is confirmed\nmodel: {hidden: 4}\n")
    for name, text in SEARCH_TABLES.items():
        (folder / f"{name}.csv").write_text(text)
    return Landscape.read(folder)


def write(folder: Path, cohort: Cohort, models: dict, params) -> Report:
    """Evaluates with `folder` as working directory."""
    seeds = {name: SEEDS[name][: len(gems)] for name, gems in models.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        evaluation = evaluate_models(cohort, models, seeds, params.evaluate, OUTPUT)
        write_tables(evaluation, OUTPUT)
        landscape = write_search(folder / "latent_kl") if len(models) > 1 else None
        data = report_data(evaluation, cohort, params, OUTPUT, landscape)
        page.write_report(data, REPORT)
    return Report(folder, data, (folder / REPORT).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def synthetic(cohort, models, params, tmp_path_factory) -> Report:
    return write(tmp_path_factory.mktemp("synthetic"), cohort, models, params)


@pytest.fixture(scope="module")
def measured(cohort, models, params, tmp_path_factory) -> Report:
    """A cohort without known truth and without controls, one model with one seed."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(cohort.folder, folder / "cohort")
    shutil.rmtree(folder / "cohort" / "truth")
    plain = Cohort(folder / "cohort")
    plain.declared = plain.declared.model_copy(update={"control": None})
    return write(folder, plain, {"gem": models["gem"][:1]}, params)


@pytest.fixture(params=["synthetic", "measured"])
def report(request) -> Report:
    return request.getfixturevalue(request.param)


class Document(HTMLParser):
    """Checks that tags are balanced; collects ids, links, and the scores of the tables."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scores: dict[tuple[str, str, str, str], float | None] = {}
        self.table: tuple[str, str] = ("", "")
        self.cell = None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "table":
            self.table = attributes.get("class"), attributes.get("data-split")
        if tag == "td":
            names = attributes.get("data-predictor"), attributes.get("data-metric")
            self.cell = (*self.table, *names) if all(names) else None
            if self.cell:
                self.scores[self.cell] = None
        if tag == "data" and self.cell:
            self.scores[self.cell] = float(attributes["value"])

    def handle_startendtag(self, tag, attrs):
        """`<line/>` in SVG."""

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open[-3:]} {self.getpos()}"
        self.open.pop()


def test_the_page_is_one_valid_file_that_opens_offline(report):
    document = Document(report.text)
    assert report.text.lstrip().startswith("<!DOCTYPE html>")
    assert len(document.ids) == len(set(document.ids))
    assert {link.removeprefix("#") for link in document.links} <= set(document.ids)
    assert not re.findall(r"https?:|//cdn|@import|url\(|<script", report.text)
    visible = re.sub(r"<details.*?</details>|<pre.*?</pre>", "", report.text, flags=re.DOTALL)
    assert not re.findall(r"\b(nan|NaN|None|inf)\b", visible)
    assert len(report.text) < 4_000_000


def test_every_section_is_present(synthetic, measured):
    sections = ["summary", "seeds", "calibration", "latents", "reproducibility", "predictors"]
    splits = list(synthetic.table("scores")["split"].unique())
    document = Document(synthetic.text)
    assert {*sections, *splits, "error-decomposition", "search"} <= set(document.ids)
    assert synthetic.text.count('class="panel"') >= 2 * 2 * len(splits) + 9 * 2
    without_truth = set(Document(measured.text).ids)
    assert set(sections) <= without_truth
    assert not {"error-decomposition", "search"} & without_truth


def test_the_settings_of_the_search_are_ranked_and_the_baseline_is_marked(synthetic):
    section = synthetic.text.split('<section id="search">')[1].split("</section>")[0]
    assert "The baseline is confirmed." in section and "therefore no gem_tuned" not in section
    table = section.split('aria-label="Settings of the search"')[1]
    rows = re.findall(r'scope="row">(.*?)</tr>', table, flags=re.DOTALL)
    cells = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in rows]
    assert [" ".join(row) for row in cells] == [
        "1 7.25 4 4.00 32 normal",
        "0 (baseline) 5.50 4 2.00 ± 0.71 4 normal",
        "2 (pruned) −9.00 2 1 multinomial",
        "3 (failed) – 1 8 normal",
    ]
    assert section.count('class="panel"') == 2 and section.count('class="stacked-bar"') == 2


def test_a_search_that_confirms_the_defaults_says_why_there_is_no_tuned_model(synthetic):
    only = replace(synthetic.data, evaluation=without_tuned(synthetic.data.evaluation))
    text = page.render(only)
    assert "The winner is the default model, therefore no gem_tuned is listed" in text
    assert "<td>gem_tuned" not in text


def without_tuned(evaluation: Evaluation) -> Evaluation:
    def rest(table: pd.DataFrame) -> pd.DataFrame:
        names = [name for name in ("predictor", "against") if name in table]
        tuned = table[names].apply(lambda column: column.str.startswith("gem_tuned"))
        return table[~tuned.any(axis=1)]

    return replace(
        evaluation,
        tables={name: rest(table) for name, table in evaluation.tables.items()},
        seeds={"gem": evaluation.seeds["gem"]},
        maps=[map_ for map_ in evaluation.maps if map_.predictor == "gem"],
    )


def test_scores_are_those_of_the_tables(report):
    scores = report.table("scores").set_index(["split", "predictor", "metric"])["value"]
    displayed = Document(report.text).scores
    assert {key[1:] for key in displayed if key[0] == "all"} == set(scores.index)
    assert {key[0] for key in displayed} == {"scores", "all"}
    for (_, *key), value in displayed.items():
        expected = scores[tuple(key)]
        assert value == expected or (value is None and pd.isna(expected))


def test_missing_scores_have_a_reason(synthetic):
    scores = synthetic.table("scores")
    reasons = scores.loc[scores["value"].isna(), "reason"].unique()
    assert len(reasons) and all(reason in html.unescape(synthetic.text) for reason in reasons)


@pytest.mark.slow
def test_all_files_are_reproducible(synthetic, cohort, models, params, tmp_path):
    again = write(tmp_path, cohort, models, params)
    files = {
        path.relative_to(synthetic.folder) for path in synthetic.folder.rglob("*") if path.is_file()
    }
    predictions = {f"{split}.parquet" for split in synthetic.table("scores")["split"]}
    expected = {"report.html", "metrics.json", *TABLE_FILES.values(), *predictions}
    expected |= set(FILES)  # of the search
    assert {file.name for file in files} == expected
    for file in files:
        assert (synthetic.folder / file).read_bytes() == (again.folder / file).read_bytes()


def test_the_page_depends_on_neither_git_nor_the_machine(synthetic, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("starts a process"))
    monkeypatch.setattr("platform.node", lambda: pytest.fail("reads the machine"))
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert page.render(synthetic.data) == synthetic.text
    assert "git" not in synthetic.text and "instruction set" in synthetic.text


def test_the_code_for_recomputing_prints_the_scores(synthetic):
    code = html.unescape(re.search(r'<pre id="recompute">(.*?)</pre>', synthetic.text, re.S)[1])
    assert "pipeline" not in code and len(code.splitlines()) <= 14
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, cwd=synthetic.folder, capture_output=True, text=True, check=True
    )
    printed = {line.split()[0]: float(line.split()[-1]) for line in result.stdout.splitlines()}
    rows = synthetic.table("scores").query("split == 'test_combination' and metric == 'mse'")
    scores = rows.set_index("predictor")["value"]
    assert printed == pytest.approx(scores[["ridge", "gem", "gem_tuned"]].to_dict(), rel=1e-5)


def test_scores_from_shared_controls_are_marked_with_one_line_below_their_table(synthetic):
    assert SHARED_NOTE not in synthetic.text
    scores = synthetic.table("scores").copy()
    rows = (scores["split"] == "test_random") & (scores["metric"] == "delta_pearson")
    scores.loc[rows, "reason"] = SHARED_CONTROLS
    tables = synthetic.data.evaluation.tables | {"scores": scores}
    evaluation = replace(synthetic.data.evaluation, tables=tables)
    text = page.render(replace(synthetic.data, evaluation=evaluation))
    cells = re.findall(r'data-metric="(\w+)">(.*?)</td>', text, flags=re.DOTALL)
    marks = [metric for metric, cell in cells if f'<abbr title="{SHARED_NOTE}">' in cell]
    assert set(marks) == {"delta_pearson"}
    assert len(marks) == 2 * scores["value"][rows].notna().sum()
    assert text.count(f'<p class="note">{SHARED_NOTE}.</p>') == 1


def test_correlations_of_conditions_from_shared_controls_are_marked(synthetic):
    conditions = [replace(each, biased=True) for each in synthetic.data.evaluation.conditions]
    evaluation = replace(synthetic.data.evaluation, conditions=conditions)
    text = page.render(replace(synthetic.data, evaluation=evaluation))
    number = sum(len(each.correlation) for each in conditions)
    assert number and text.count(f'<abbr title="{SHARED_NOTE}">') == number


def test_parameters_are_listed(synthetic, params):
    text = html.unescape(synthetic.text)
    sections = ("model", "train", "data", "splits", "evaluate", "synthesize")
    for name, value in params.flat(*sections).items():
        assert re.search(
            rf'scope="row">{re.escape(name.split(".", 1)[1])}</th><td class="wrap">'
            rf"{re.escape(str(value))}</td>",
            text,
        ), name


def test_label_heads_are_listed_with_chance_and_calibration_error(synthetic):
    table = synthetic.text.split('aria-label="Label heads"')[1].split("</table>")[0]
    heads = page.head_rows(synthetic.table("latents"))
    assert len(heads) == len(set(heads)) > 2
    for row in heads:
        cells = [
            page.number(row.accuracy),
            page.number(row.chance),
            page.number(row.calibration_error, "calibration"),
        ]
        assert re.search(
            rf'scope="row">{row.head}</th><td class="name">{row.model}</td><td>{row.group}</td>'
            + "".join(rf'<td class="n">{cell}</td>' for cell in cells),
            table,
        )


def test_probes_are_scaled_to_chance(synthetic):
    latents = synthetic.table("latents")
    table = latents[(latents["measure"] == "probe") & (latents["predictor"] == "gem")]
    rows = page.probe_rows(latents)["gem"]
    assert [row.covariate for row in rows] == list(dict.fromkeys(table["covariate"]))
    for row in rows:
        for group, probe in row.probes.items():
            scaled = row.above_chance(group)
            assert probe.chance + scaled * (1 - probe.chance) == pytest.approx(probe.value)


def test_without_truth_the_skill_is_up_to_a_replicate(measured):
    rows = measured.table("scores").query("predictor == 'gem' and metric == 'skill_replicate'")
    assert "1 ideal" not in measured.text
    for row in rows.itertuples():
        summary = re.search(
            rf'<h2><a href="#{row.split}">{row.split}</a>.*?</p>\s*<p>(.*?)</p>',
            measured.text,
            re.S,
        )[1]
        available = "a replicate of the experiment" in summary
        assert available == pd.notna(row.value)
        assert available != ("has no skill_replicate" in summary)


def test_one_seed_has_no_standard_deviation(synthetic, measured):
    for report, expected in ((synthetic, True), (measured, False)):
        table = report.text.split('aria-label="Training seeds"')[1].split("</table>")[0]
        assert (" ± " in table) == expected


def test_texts_from_a_cohort_are_escaped(synthetic):
    attack = """<script>alert("x")</script> & '"""
    evaluation = synthetic.data.evaluation
    latents = evaluation.tables["latents"]
    scores = evaluation.tables["scores"]
    changed = replace(
        evaluation,
        conditions=[replace(evaluation.conditions[0], name=attack)],
        maps=[replace(map_, covariate=attack, levels=(attack,)) for map_ in evaluation.maps],
        tables=evaluation.tables
        | {
            "latents": latents.assign(covariate=attack + latents["covariate"], reason=attack),
            "scores": scores.assign(reason=scores["reason"].where(scores["reason"] == "", attack)),
        },
    )
    text = page.render(
        ReportData(
            changed,
            attack,
            {"notes": attack},
            {"model": {"x": attack}},
            attack,
            attacking_search(synthetic.data.search, attack),
        )
    )
    assert "<script" not in text and 'alert("' not in text and "& '" not in text
    assert text.count("&lt;script") >= 30
    Document(text)


def attacking_search(search: Landscape, attack: str) -> Landscape:
    names = {"model.observation": f"a.{attack}"}
    trials = search.trials.assign(state=attack).rename(columns=names)
    trials[f"a.{attack}"] = attack
    importance = search.importance.assign(parameter=attack)
    return replace(
        search, name=attack, summary=attack, metric="mse", trials=trials, importance=importance
    )


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.04512, "mse", "0.0451"),
        (-0.00001, "mse", "0.0000"),
        (-1.234, "skill", "−1.23"),
        (0.12345, "calibration", "0.123"),
        (None, "mse", "–"),
        (float("nan"), "skill", "–"),
    ],
)
def test_numbers_have_the_digits_of_their_metric(value, metric, text):
    assert page.number(value, metric) == text


def test_the_largest_reducible_part_of_the_error_is_named():
    values = {
        "count noise": 0.02,
        "seeds": 0.001,
        "by study": 0.009,
        "by pair": 0.03,
        "sampling error": 0.0,
    }
    assert page.error_sentence("gem", values) == (
        "33 % of the mse of GEM (0.0600) is sampling error or irreducible with the same inputs. "
        "Largest reducible part: by pair (0.0300, 50 %)."
    )
    assert tuple(page.ADVICE) == PARTS


@pytest.mark.parametrize(
    ("values", "expected", "ends"),
    [
        ([2, 4, 3], [0.0, 1.0, 0.5], ("2", "4")),
        ([1.0, 100.0, 10.0], [0.0, 1.0, 0.5], ("1", "100")),  # a logarithmic axis
        ([0.0, 100.0, 10.0], [0.0, 1.0, 0.1], ("0", "100")),
        (["b", "a", "b"], [0.0, 1.0, 0.0], ("b", "a")),
        ([7, 7], [0.0, 0.0], ("7", "7")),
    ],
)
def test_the_axis_of_a_key_fits_its_values(values, expected, ends):
    x, texts = positions(values)
    assert x.tolist() == pytest.approx(expected) and texts == ends
