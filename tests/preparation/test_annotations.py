"""Feature, target-gene and gene-list tables: read in every form, refused with all problems."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.preparation.annotations import read_annotations

GENES = pd.Series(["g1", "g2", "g3"])
TARGETS = pd.DataFrame({"perturbation": ["a", "b"], "gene_id": ["g1", "g2"]})
FEATURES = pd.DataFrame({"label": ["a", "b"], "feature_1": [0.5, -1.0]})


def write(table: pd.DataFrame, path: Path) -> None:
    """As CSV or Parquet by the suffix."""
    save = table.to_csv if path.suffix == ".csv" else table.to_parquet
    save(path, index=False)


@pytest.fixture
def annotate(params, tmp_path):
    """Annotations for tables of `tmp_path`: features, targets and a gene list by file name."""

    def read(features=None, targets=None, gene_list=None):
        covariates = params.data.covariates.identities().model_dump(mode="json")
        if features:
            table = str(tmp_path / features)
            covariates["perturbation"]["perturbation"] = {"kind": "embedding", "table": table}
        values = params.data.model_dump(mode="json") | {"source": "here", "covariates": covariates}
        values["target_gene"] = targets and str(tmp_path / targets)
        values["gene_list"] = gene_list and str(tmp_path / gene_list)
        return read_annotations(type(params.data).model_validate(values), GENES)

    return read


def problems_of(annotate, **tables) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        annotate(**tables)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_without_tables_annotations_are_empty(annotate):
    annotations = annotate()
    assert annotations.features == {} and annotations.gene_list is None
    assert list(annotations.targets) == ["perturbation", "gene_id"] and annotations.targets.empty


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_csv_and_parquet_tables_hold_the_same(annotate, tmp_path, suffix):
    write(FEATURES, tmp_path / f"features{suffix}")
    write(TARGETS, tmp_path / f"targets{suffix}")
    annotations = annotate(f"features{suffix}", f"targets{suffix}")
    pd.testing.assert_frame_equal(annotations.targets, TARGETS, check_dtype=False)
    features = annotations.features["perturbation"]
    assert features.labels == ("a", "b")
    np.testing.assert_array_equal(features.values, [[0.5], [-1.0]])


def test_targets_without_a_gene_are_dropped(annotate, tmp_path):
    write(TARGETS.assign(gene_id=["g1", None]), tmp_path / "targets.csv")
    assert annotate(targets="targets.csv").targets["perturbation"].tolist() == ["a"]


def test_a_perturbation_may_have_several_targets_each_once(annotate, tmp_path):
    several = pd.concat([TARGETS, TARGETS.assign(gene_id="g3"), TARGETS.iloc[:1]])
    write(several, tmp_path / "targets.csv")
    found = annotate(targets="targets.csv").targets
    assert found.groupby("perturbation")["gene_id"].apply(list).to_dict() == {
        "a": ["g1", "g3"],
        "b": ["g2", "g3"],
    }


def test_all_problems_of_all_tables_are_reported_at_once(annotate, tmp_path):
    write(FEATURES.assign(feature_1="text"), tmp_path / "features.csv")
    write(TARGETS.assign(gene_id="NOGENE"), tmp_path / "targets.csv")
    (tmp_path / "genes.txt").write_text("g9\n")
    problems = problems_of(
        annotate, features="features.csv", targets="targets.csv", gene_list="genes.txt"
    )
    assert len(problems) == 3
    assert "features.csv: feature feature_1 holds" in problems[0]
    assert "targets.csv: genes NOGENE are not in here" in problems[1]
    assert "genes.txt: genes g9 are not in here" in problems[2]


TARGET_MISTAKES = {
    "absent": (None, "absent; data.target_gene names it"),
    "no parquet": (b"gene", "cannot be read as a Parquet table"),
    "no column": (
        TARGETS.rename(columns={"gene_id": "gene"}),
        "no column gene_id; expected perturbation and gene_id, found perturbation, gene",
    ),
    "lists": (TARGETS.assign(gene_id=[["g1"], ["g2"]]), "gene_id: "),
}


@pytest.mark.parametrize("mistake", TARGET_MISTAKES)
def test_an_invalid_table_of_targets_is_one_problem(annotate, tmp_path, mistake):
    content, message = TARGET_MISTAKES[mistake]
    path = tmp_path / "targets.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(content, path)
    (problem,) = problems_of(annotate, targets="targets.parquet")
    assert problem.startswith(f"{path}: ") and message in problem


def test_an_absent_feature_table_is_one_problem(annotate, tmp_path):
    (problem,) = problems_of(annotate, features="features.csv")
    assert problem.startswith(f"{tmp_path / 'features.csv'}: absent")


# gene lists

GENE_LISTS = {
    "genes.txt": lambda path: path.write_text("g1\n\n  g2 \ng2\n"),
    "genes": lambda path: path.write_text("g1\r\ng2\r\n"),
    "genes.csv": lambda path: path.write_text("symbol,gene_id\nA,g1\nB,g2\n,\n"),
    "genes.tsv.gz": lambda path: path.write_bytes(gzip.compress(b"x\tgene_id\n\tg1\n\tg2")),
    "bom.txt": lambda path: path.write_text("g1\ng2", encoding="utf-16"),
    "genes.parquet": lambda path: pd.DataFrame({"gene_id": ["g1", "g2", None]}).to_parquet(path),
}


@pytest.mark.parametrize("name", GENE_LISTS)
def test_gene_lists_of_every_form_hold_the_same_genes(annotate, tmp_path, name):
    GENE_LISTS[name](tmp_path / name)
    assert set(annotate(gene_list=name).gene_list) == {"g1", "g2"}


GENE_LIST_MISTAKES = [
    ("genes.txt", b"g1\nG2\ng3.1\n", "genes G2, g3.1 are not in here"),
    ("genes.txt", b"\n\n", "no gene; list at least one"),
    ("genes.txt", b"\xff\xfe\x00", "cannot be read as a list of names"),
    ("genes.csv", b"gene,symbol\ng1,A\n", "no column gene_id; expected gene_id, found gene"),
    ("genes.tsv", b"gene_id\tgene_id\ng1\tg2\n", "columns gene_id occur more than once"),
    ("genes.csv", b"", "cannot be read as a CSV table"),
    ("genes.parquet", b"g1\n", "cannot be read as a Parquet table"),
    ("absent.txt", None, "absent; data.gene_list names it"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    GENE_LIST_MISTAKES,
    ids=[f"{name}: {message}" for name, _, message in GENE_LIST_MISTAKES],
)
def test_an_invalid_gene_list_is_one_problem(annotate, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (problem,) = problems_of(annotate, gene_list=name)
    assert problem.startswith(f"{tmp_path / name}: {message}")
