"""A model file is not believed: what it declares is checked before it is used, and a difference is named."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.gem import GEM
from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.data.encoder import MetadataEncoder


@pytest.fixture(scope="module")
def gem(model_directory) -> GEM:
    return GEM.load(model_directory)


@pytest.fixture
def content(model_directory) -> dict:
    return torch.load(model_directory / "model.pt", weights_only=True)


def assert_refused(folder: Path, content: object, message: str) -> None:
    torch.save(content, folder / "model.pt")
    with pytest.raises(IntegrityError, match=message):
        GEM.load(folder)


def test_a_file_keeps_what_training_saw_together_and_the_temperatures(gem, model_directory, cohort):
    train = cohort.rows(["train"])
    expected = set(
        train[["tissue", "cell_type", "perturbation"]].itertuples(index=False, name=None)
    )
    assert set(gem.seen.combinations) == expected and gem.seen.control == (
        "perturbation",
        "control",
    )
    assert set(gem.temperatures) == {field.name for field in gem.metadata.heads()}
    assert any(temperature != 1 for temperature in gem.temperatures.values())
    assert gem.to_bytes() == (model_directory / "model.pt").read_bytes()
    stored = torch.load(model_directory / "model.pt", weights_only=True)
    assert stored["gene_list_sha256"] == cohort.manifest["gene_list_sha256"]


HOSTILE = {
    "a number that is not finite": (
        lambda w: torch.where(torch.arange(w.numel()).view_as(w) == 3, torch.nan, w),
        "not finite",
    ),
    "an infinite number": (lambda w: w / 0, "not finite"),
    "a sparse tensor": (lambda w: w.to_sparse(), "no dense tensor"),
    "a sparse tensor of a huge shape": (
        lambda w: torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.long), [1.0], (2**31, 2**31), check_invariants=True
        ),
        "no dense tensor",
    ),
    "an expanded tensor": (lambda w: torch.zeros(1, 1).expand(w.shape), "fill its memory"),
    "a huge expanded tensor": (lambda w: torch.zeros(1, 1).expand(2**20, 2**20), "expected"),
    "a transposed tensor": (lambda w: w.t().contiguous().t(), "fill its memory"),
    "another type": (lambda w: w.double(), "float64, expected torch.float32"),
    "another shape": (lambda w: w[:-1], "expected"),
    "no tensor": (lambda w: w.tolist(), "weights"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_are_refused(content, tmp_path, kind):
    change, message = HOSTILE[kind]
    name = "linear_decoder.weight"
    assert_refused(
        tmp_path,
        content | {"weights": content["weights"] | {name: change(content["weights"][name])}},
        message,
    )


def test_missing_and_surplus_weights_are_named(content, tmp_path):
    weights = dict(content["weights"])
    weights["stranger"] = weights.pop("linear_decoder.weight")
    assert_refused(
        tmp_path,
        content | {"weights": weights},
        r"1 missing \(linear_decoder.weight\); 1 unknown \(stranger\)",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 10**12},
        {"interactions": 10**12},
        {"latent": {"technical": 4096, "biological": 4096, "perturbation": 4096}},
    ],
)
def test_a_network_that_no_machine_could_hold_is_refused_without_being_made(
    content, tmp_path, change
):
    assert_refused(tmp_path, content | {"model": content["model"] | change}, "do not fit")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("genes", [], "genes"),
        ("genes", [1, 2], "genes"),
        ("genes", "abc", "genes"),
        ("gene_list_sha256", "0", "not that of the genes"),
        ("metadata", {}, "metadata"),
        ("model", {"hidden": "many"}, "model"),
        ("targets", {"column": None, "genes": {"x": 10**6}}, "hit genes that are none"),
        ("targets", {"column": None, "genes": {"x": -1}}, "targets"),
        ("temperatures", {"tissue": float("nan")}, "temperatures"),
        ("temperatures", {"tissue": -1.0}, "temperatures"),
        ("temperatures", {}, "other heads"),
        (
            "seen",
            {"columns": ["a"], "several": [], "control": None, "combinations": [["x", "y"]]},
            "another length",
        ),
        ("hidden_study", 3, "hidden_study"),
        ("surprise", 1, "surprise"),
    ],
)
def test_content_of_another_kind_is_refused_by_its_key(content, tmp_path, key, value, message):
    assert_refused(tmp_path, content | {key: value}, message)


def test_features_that_are_not_finite_are_refused(content, tmp_path):
    field = next(field for field in content["metadata"]["perturbation"] if field["features"])
    field["features"]["values"][0, 0] = torch.inf
    assert_refused(tmp_path, content, "perturbation: features holds a number that is not finite")


def test_a_list_that_is_named_many_times_is_refused_before_it_grows(content, tmp_path):
    names = [f"{number}" for number in range(10_000)]
    assert_refused(
        tmp_path,
        content
        | {
            "seen": {
                "columns": [],
                "several": [],
                "control": None,
                "combinations": [names] * 10_000,
            }
        },
        "more values than bytes",
    )


def test_a_compressed_archive_is_refused_before_it_is_unpacked(model_directory, tmp_path):
    with (
        zipfile.ZipFile(model_directory / "model.pt") as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(IntegrityError, match="compressed"):
        GEM.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [None, 3, [], {}, {"format_version": None}, {"format_version": 4}, {"format_version": True}],
)
def test_any_other_content_is_refused(tmp_path, content):
    assert_refused(tmp_path, content, "model.pt: ")


def test_a_pickle_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"format_version": 4}))
    with pytest.raises(IntegrityError, match="not a GEM model file"):
        GEM.load(tmp_path)


def test_another_vocabulary_is_refused_with_the_difference(gem, cohort):
    declared, train = cohort.declared.covariates, cohort.rows(["train"])
    gem.require_vocabulary(MetadataEncoder.fit(train, declared, cohort.features))
    tissue = train["tissue"].iloc[0]
    with pytest.raises(
        IntegrityError,
        match=rf"tissue: 1 labels that the data lacks \({tissue}\), 1 that the model lacks \(spleen\)",
    ):
        gem.require_vocabulary(
            MetadataEncoder.fit(
                train.assign(tissue=train["tissue"].replace(tissue, "spleen")),
                declared,
                cohort.features,
            )
        )
    with pytest.raises(IntegrityError, match="age_years: mean"):
        gem.require_vocabulary(
            MetadataEncoder.fit(
                train.assign(age_years=train["age_years"] + 1), declared, cohort.features
            )
        )
    fewer = declared.model_copy(update={"technical": {"study": declared.technical["study"]}})
    with pytest.raises(
        IntegrityError, match=r"covariates library_layout, .* known to the model only"
    ):
        gem.require_vocabulary(MetadataEncoder.fit(train, fewer, cohort.features))


def test_the_hash_of_the_genes_is_that_of_the_cohort(gem, cohort):
    assert sha256_of([str(gene) for gene in gem.genes]) == cohort.manifest["gene_list_sha256"]
    assert replace(gem, genes=np.array(["other"])).to_bytes() != gem.to_bytes()
