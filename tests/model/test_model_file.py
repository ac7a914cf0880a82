"""Model files: the same model after loading, and refusal of damaged and hostile files."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from support.encoding import dense
from support.generation import generate

from pipeline.gem.common.config import Covariates
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.splits import VISIBLE
from pipeline.gem.model import model_file, tensor_file
from pipeline.gem.model.gem import TrainedGEM

Content = tuple[dict, dict[str, torch.Tensor]]  # description, tensors


@pytest.fixture(scope="module")
def gem(model_directory) -> TrainedGEM:
    return TrainedGEM.load(model_directory)


@pytest.fixture
def content(model_directory) -> Content:
    path = model_directory / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["gem"])["content"]
    return description, safetensors.torch.load_file(path)


def write(path: Path, description: dict, tensors: dict[str, torch.Tensor]) -> None:
    """A model file with a correct checksum."""
    text = json.dumps(description, separators=(",", ":"), ensure_ascii=False)
    path.write_bytes(tensor_file.pack(text, tensors, "write less"))


def assert_refused(path: Path, message: str) -> None:
    """One printable line that names the file."""
    with pytest.raises(IntegrityError, match=message) as caught:
        TrainedGEM.load(path)
    assert all(problem.isprintable() for problem in caught.value.problems)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)


# --- the same model ---


def test_a_saved_model_predicts_the_same_and_has_the_same_bytes(gem, cohort, tmp_path):
    samples, references = cohort.rows(["train"]).head(12), cohort.expression(["train"])[20:32]
    gem.save(tmp_path / "first" / "model.safetensors")
    gem.save(tmp_path / "second.safetensors")
    for path in (tmp_path / "first", tmp_path / "second.safetensors"):
        loaded = TrainedGEM.load(path)
        assert not loaded.network.training
        assert loaded.to_bytes() == gem.to_bytes()
        for reference in (None, references):
            np.testing.assert_array_equal(
                generate(loaded, samples, reference), generate(gem, samples, reference)
            )


def test_bytes_are_those_of_the_training_process_and_change_with_the_model(gem, model_directory):
    assert gem.to_bytes() == (model_directory / "model.safetensors").read_bytes()
    assert replace(gem, genes=np.array(["other"])).to_bytes() != gem.to_bytes()


def test_a_file_holds_the_training_support_the_temperatures_and_the_genes(gem, content, cohort):
    train = cohort.rows(VISIBLE)  # the model is refitted
    columns = ["tissue", "cell_type", "perturbation"]
    combinations = set(train[columns].itertuples(index=False, name=None))
    assert set(gem.training_support.combinations) == combinations
    assert gem.label_form.control == ("perturbation", "control")
    assert set(gem.temperatures) == {field.name for field in gem.metadata.heads()}
    assert any(temperature != 1 for temperature in gem.temperatures.values())
    assert content[0]["gene_list_sha256"] == cohort.manifest["gene_list_sha256"]
    assert sha256_of([str(gene) for gene in gem.genes]) == content[0]["gene_list_sha256"]


def test_encoders_of_every_kind_of_covariate_are_restored():
    samples = pd.DataFrame(
        {
            "study": ["1", "2", "3", None],
            "platform": ["a", "a", "b", None],
            "marks": ["x|y", "y", None, "z"],
            "age": [1.5, 2.0, None, 7.0],
            "dose": ["1 uM", "2 nM", "3 hours", None],
            "drug": ["a", "b", "a|b", None],
        }
    )
    kinds = {
        "technical": {"study": "categorical", "platform": "categorical"},
        "biological": {"marks": "multilabel", "age": "linear"},
        "perturbation": {"dose": "log", "drug": "embedding"},
    }
    numeric = {scale: {"kind": "numeric", "scale": scale} for scale in ("linear", "log")}
    declared = numeric | {"embedding": {"kind": "embedding", "table": "drugs.csv"}}
    covariates = Covariates.model_validate(
        {
            group: {name: declared.get(kind, {"kind": kind}) for name, kind in fields.items()}
            for group, fields in kinds.items()
        }
    )
    features = FeatureTable(("a", "b"), np.array([[0, -1], [4, 1]], dtype=np.float32))
    encoder = MetadataEncoder.fit(samples, covariates, {"drug": features})
    state = model_file.MetadataState.from_encoder(encoder).model_dump_json()
    tensors = model_file.named_tensors({}, encoder)
    restored = model_file.MetadataState.model_validate_json(state).to_encoder(tensors)
    assert restored.differences(encoder) == []
    assert restored.dependencies == encoder.dependencies != []
    for group, matrix in dense(encoder, samples).items():
        np.testing.assert_array_equal(dense(restored, samples)[group], matrix)


def test_loading_leaves_the_global_random_state_alone(model_directory):
    before = torch.random.get_rng_state()
    TrainedGEM.load(model_directory)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_absent_model_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="absent"):
        TrainedGEM.load(tmp_path / "model.safetensors")


def test_a_header_above_the_size_limit_is_neither_written_nor_read(gem, tmp_path, monkeypatch):
    gem.save(tmp_path / "model.safetensors")
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 100)
    assert_refused(tmp_path / "model.safetensors", "more than 100")
    with pytest.raises(InputError, match="more than 100"):
        gem.to_bytes()


# --- damaged files ---


def header(entries: dict | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


class Trap:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


FILES = {
    "empty": b"",
    "text": b"a text, not a model",
    "bytes": bytes(range(256)),
    "a header larger than the file": struct.pack("<Q", 2**60) + b"{}",
    "a header above the limit": struct.pack("<Q", 2**30) + b"{}",
    "a header that is no JSON": header(b"{" * 100),
    "a deeply nested header": header(b'{"a":' + b"[" * 100_000),
    "a header that is no UTF-8": header(b'{"\xff": 3}'),
    "overlapping tensors": header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "two tensors at one offset": header({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap between tensors": header({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "a huge shape": header({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)),
    "an unknown type": header({"a": entry(0, 8, dtype="F99\n\x1b[31m")}, bytes(8)),
    "no description": header({"a": entry(0, 8)}, bytes(8)),
    "a million empty tensors": header({f"{n}": entry(0, 0, (0,)) for n in range(70_000)}),
    "another description": header({"__metadata__": {"format": "pt"}, "a": entry(0, 8)}, bytes(8)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_format_is_refused(tmp_path, kind):
    (tmp_path / "model.safetensors").write_bytes(FILES[kind])
    assert_refused(tmp_path / "model.safetensors", "not a GEM model file")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path, writer):
    path, content = tmp_path / "model.safetensors", {"weights": Trap(tmp_path / "ran")}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert_refused(path, "not a GEM model file")
    assert not (tmp_path / "ran").exists()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


OTHER_NODES = {
    "folder": Path.mkdir,
    "pipe": make_fifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", OTHER_NODES)
def test_what_is_no_regular_file_is_refused_without_reading(tmp_path, kind):
    OTHER_NODES[kind](tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match="not a GEM model file"):
        TrainedGEM.load(tmp_path)


SEEDS = ['{"first": 1, "others": ["../../x"]}', '{"first": 1}', "{" * 9, "[" * 10**5, "", b"\xff"]


@pytest.mark.parametrize("text", SEEDS)
def test_a_damaged_list_of_seeds_is_refused(gem, tmp_path, text):
    gem.save(tmp_path / "model.safetensors")
    path = tmp_path / "seeds" / "seeds.json"
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(IntegrityError, match="not a list of seeds") as caught:
        TrainedGEM.load_seeds(tmp_path)
    assert len(caught.value.problems) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize("share", [0.001, 0.01, *np.arange(1, 8) / 8, 0.999])
def test_a_truncated_file_is_refused(gem, tmp_path, share):
    whole = gem.to_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert_refused(tmp_path / "model.safetensors", "not a GEM model file")


@pytest.mark.parametrize("part", ["weights", "description"])
def test_a_flipped_bit_is_refused(gem, tmp_path, part):
    content = bytearray(gem.to_bytes())
    weights = max(gem.network.state_dict().values(), key=torch.numel).numpy().tobytes()
    places = {"weights": content.index(weights) + len(weights) // 2}
    places["description"] = content.index(gem.genes[0].encode())
    content[places[part]] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path / "model.safetensors", "does not match its checksum")


# --- hostile files ---

Change = Callable[[dict, dict[str, torch.Tensor]], object]
WEIGHT, FEATURES = "network.linear_decoder.weight", "features.9"


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_key(key: str, value: object) -> Change:
    return lambda description, _: description.update({key: value})


def with_model(**values: object) -> Change:
    return lambda description, _: description["model"].update(values)


def first_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: torch.where(torch.arange(w.numel()).view_as(w) == 0, value, w)


def metadata_with(**values: object) -> Change:
    return lambda description, _: description["metadata"]["perturbation"][0].update(values)


def with_levels(change: Callable[[list[str]], list[str]]) -> Change:
    def apply(description: dict, _: dict) -> None:
        state = description["metadata"]["biological"][1]
        state["levels"] = change(state["levels"])

    return apply


def without_tensor(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


def with_mixed(**values: object) -> Change:
    return lambda description, _: description["mixed"].update(values)


def with_variances(**values: object) -> Change:
    return lambda description, _: description["mixed"]["variances"][0].update(values)


def with_term(**values: object) -> Change:
    """Changes the first factor of the first term."""
    return lambda description, _: _first_term(description)["factors"][0].update(values)


def with_columns(columns: list[int]) -> Change:
    return lambda description, _: _first_term(description).update(columns=columns)


def with_contexts(**values: object) -> Change:
    return lambda description, _: description["mixed"]["design"]["contexts"].update(values)


def _first_term(description: dict) -> dict:
    return description["mixed"]["design"]["terms"][0]


TOO_WIDE = {"technical": 4096, "biological": 4096, "perturbation": 4096}
SUPPORT = {"columns": ["a"]}
DEPENDENCY = {"determinant": "tissue", "determined": "nothing", "levels": {}}
HOSTILE: dict[str, tuple[Change, str]] = {
    "NaN weight": (with_tensor(WEIGHT, first_value(torch.nan)), f"{WEIGHT} .*not finite"),
    "infinite weight": (with_tensor(WEIGHT, first_value(torch.inf)), f"{WEIGHT} .*not finite"),
    "infinite feature": (with_tensor(FEATURES, first_value(torch.inf)), f"{FEATURES} .*not fin"),
    "other type": (with_tensor(WEIGHT, torch.Tensor.double), "float64, expected torch.float32"),
    "other shape": (with_tensor(WEIGHT, lambda w: w[:-1]), r"linear_decoder.weight has shape .*ex"),
    "fewer features": (with_tensor(FEATURES, lambda w: w[:-1]), "features of shape .* labels"),
    "flat features": (with_tensor(FEATURES, torch.Tensor.flatten), "features of shape .* labels"),
    "no features": (lambda _, tensors: tensors.pop(FEATURES), f"no tensor {FEATURES}"),
    "no feature labels": (metadata_with(feature_labels=None), "an embedding without features"),
    "surplus features": (
        lambda _, tensors: tensors.update({"features.x": torch.zeros(1, 1)}),
        "unknown features features.x",
    ),
    "surplus tensor": (
        lambda _, tensors: tensors.update({"a\n\x1b[31m": torch.zeros(1)}),
        r"unknown tensor a\\n\\x1b\[31m",
    ),
    "renamed weight": (
        lambda _, tensors: tensors.update({"network.other": tensors.pop(WEIGHT)}),
        r"1 missing \(linear_decoder.weight\); 1 unknown \(other\)",
    ),
    "blocks without weights": (with_model(blocks=1000), r"2000 blocks for \d\d tensors"),
    "prior blocks without weights": (with_model(prior_blocks=1000), r"2002 blocks for \d\d "),
    "a million blocks": (with_model(blocks=10**6), "model.blocks: Input should be less than"),
    "features without labels": (
        lambda description, tensors: (
            metadata_with(feature_labels=[])(description, tensors),
            tensors.update({FEATURES: torch.zeros(0, 10**12)}),
        ),
        "feature_labels: Tuple should have at least 1 item",
    ),
    "a level twice": (with_levels(lambda levels: [*levels, levels[-1]]), "repeated or not sorted"),
    "levels swapped": (with_levels(lambda levels: levels[::-1]), "repeated or not sorted"),
    "a level short": (with_levels(lambda levels: levels[:-1]), "on unknown levels"),
    "features of a label twice": (
        lambda d, _: d["metadata"]["perturbation"][0].update(
            feature_labels=["x", "x", *d["metadata"]["perturbation"][0]["feature_labels"][2:]]
        ),
        "features of x occur twice",
    ),
    "an unknown dimension": (
        lambda d, _: d["metadata"]["perturbation"][2].update(levels=["length"]),
        "perturbation_dose: length are no dimensions",
    ),
    "a covariate twice": (metadata_with(name="tissue"), "the covariate tissue occurs twice"),
    "a dependency on unknown levels": (
        lambda d, _: d["metadata"]["dependencies"].append(
            {"determinant": "cell_type", "determined": "tissue", "levels": {"a\nb": "c"}}
        ),
        "dependency of cell_type, tissue on unknown levels",
    ),
    "an extreme temperature": (with_key("temperatures", {"tissue": 1e-320}), "temperatures.tissue"),
    "wider network": (with_model(hidden=33), "weights do not fit"),
    "network above memory": (with_model(hidden=2**16, expansion=1000), "weights do not fit"),
    "interactions above memory": (with_model(interactions=2**16), "weights do not fit"),
    "latents above memory": (with_model(latent=TOO_WIDE), "weights do not fit"),
    "unknown model parameter": (with_model(hidden="many"), "model.hidden"),
    "other version": (with_key("format_version", 4), "format_version: Input should be 11"),
    "no genes": (with_key("genes", []), "genes"),
    "term of an unknown covariate": (with_term(covariate="nothing"), "the covariates lack"),
    "smooth term of labels": (with_term(kind="smooth"), "the covariates lack"),
    "columns outside the term": (with_columns([10**9]), "not those of its factors"),
    "repeated columns": (with_columns([0, 0]), "repeated or not sorted"),
    "no columns": (with_columns([]), "absent"),
    "effects of other columns": (with_columns([0]), "coefficients has shape"),
    "contexts of no column": (with_contexts(columns=[]), "whose columns have no levels"),
    "other contexts": (with_contexts(contexts=[5, 4, 3]), "contexts that are repeated"),
    "contexts without features": (with_contexts(features=[[1.0]]), "one row for each context"),
    "network weight above one": (with_mixed(network_weight=1.5), "network_weight"),
    "negative noise": (with_variances(noise=-1.0), "negative or not finite"),
    "NaN variance of rows": (with_variances(row=float("nan")), "variances.0.row"),
    "variances of other terms": (with_variances(terms=[1.0]), "variances of 1 terms, expected"),
    "no variances": (with_mixed(variances=[]), "variances"),
    "mixed model without effects": (without_tensor("mixed.coefficients"), "mixed: tensors"),
    "effects without a mixed model": (with_key("mixed", None), "tensors without terms"),
    "numbers as genes": (with_key("genes", [1, 2]), "genes"),
    "text as genes": (with_key("genes", "abc"), "genes"),
    "duplicate gene": (lambda d, _: d["genes"].__setitem__(0, d["genes"][1]), "occurs twice"),
    "other gene hash": (with_key("gene_list_sha256", "0"), "not the hash of the genes"),
    "no metadata": (with_key("metadata", {}), "metadata"),
    "target beyond the genes": (
        with_key("targets", {"column": None, "genes": {"x": [10**6]}, "sets": False}),
        "x target none of the",
    ),
    "negative target": (
        with_key("targets", {"column": None, "genes": {"x": [0, -1]}, "sets": False}),
        "x target none",
    ),
    "repeated target": (
        with_key("targets", {"column": None, "genes": {"x": [1, 1]}, "sets": False}),
        "x target a gene twice",
    ),
    "NaN temperature": (with_key("temperatures", {"tissue": float("nan")}), "temperatures"),
    "negative temperature": (with_key("temperatures", {"tissue": -1.0}), "temperatures"),
    "no temperatures": (with_key("temperatures", {}), "temperatures are not those of its label"),
    "other combinations": (
        with_key("training_support", SUPPORT | {"combinations": [["x", "y"]]}),
        "combinations not of 1 values",
    ),
    "unknown dependency": (
        lambda d, _: d["metadata"]["dependencies"].append(DEPENDENCY),
        "unknown covariates tissue, nothing",
    ),
    "number as study": (with_key("hidden_study", 3), "hidden_study"),
    "missing key": (lambda d, _: d.pop("model"), "model: Field required"),
    "unknown key": (with_key("a\nb", 1), r"a\\nb: Extra inputs are not permitted"),
    "unknown nested key": (
        with_key("targets", {"column": None, "genes": {}, "sets": False, "x": 1}),
        "targets.x",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(content, tmp_path, kind):
    change, message = HOSTILE[kind]
    description, tensors = content
    change(description, tensors)
    write(tmp_path / "model.safetensors", description, tensors)
    assert_refused(tmp_path / "model.safetensors", message)


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "null", "{}", "[" * 100_000])
def test_any_other_description_is_refused(content, tmp_path, text):
    safetensors.torch.save_file(content[1], tmp_path / "model.safetensors", {"gem": text})
    assert_refused(tmp_path / "model.safetensors", "train the model again")


def test_the_unchanged_content_is_accepted(content, gem, tmp_path):
    write(tmp_path / "model.safetensors", *content)
    assert TrainedGEM.load(tmp_path).to_bytes() == gem.to_bytes()
