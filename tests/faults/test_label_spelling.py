"""Spelling labels at random changes no split and no entity, and no held-out set is in training."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
from support.designs import declare_data

from pipeline.gem.common.config import Params, Splits
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.shards import ShardWriter
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort

SAMPLES, GENES = 500, 25
DRUGS = ["caf\u00e9ine", "5\u03bc-drug", "drug / C", "D", "E", "?"]
CONTEXTS = [
    ("lung / airway", "epithelium"),
    ("lung", "airway / epithelium"),
    ("?", "T"),
    ("r", "T"),
]
INVISIBLE = ["\u200b", "\ufeff", "\u00ad", "\u2060", "\u200e", "\ufe0f"]
PARTS = {"combination": "pair", "perturbation": "drugs"}


def original(rng: np.random.Generator) -> pd.DataFrame:
    """Samples with up to three drugs, each label in its one spelling."""
    context = rng.integers(0, len(CONTEXTS), SAMPLES)
    drugs = [sorted(rng.choice(DRUGS, rng.integers(0, 4), replace=False)) for _ in range(SAMPLES)]
    return pd.DataFrame(
        {
            "sample_id": [f"s{row:04d}" for row in range(SAMPLES)],
            "study": [f"study {number}" for number in rng.integers(0, 8, SAMPLES)],
            "tissue": [CONTEXTS[number][0] for number in context],
            "cell": [CONTEXTS[number][1] for number in context],
            "drugs": ["|".join(labels) or "DMSO" for labels in drugs],
            "time": rng.choice(["24 h", "6 h"], SAMPLES),
        }
    )


def respell(label: str, rng: np.random.Generator) -> str:
    """The same label with other code points."""
    text = unicodedata.normalize(rng.choice(["NFC", "NFD"]), label)
    text = text.replace(" ", rng.choice([" ", "\u00a0", "  ", "\u2003", "\t"]))
    text = text.replace("\u03bc", rng.choice(["\u03bc", "\u00b5"]))
    if rng.random() < 0.3:
        text = "".join(chr(ord(c) + 0xFEE0) if "A" <= c <= "Z" else c for c in text)
    for _ in range(rng.integers(0, 3)):
        place = rng.integers(0, len(text) + 1)
        text = text[:place] + rng.choice(INVISIBLE) + text[place:]
    return rng.choice(["", " "]) + text + rng.choice(["", "\n", "\u00a0"])


def respell_set(cell: str, rng: np.random.Generator) -> str:
    """Also in another order, with labels twice, and with the control among them."""
    labels = cell.split("|")
    labels += list(rng.choice([*labels, "DMSO", ""], rng.integers(0, 3)))
    return rng.choice(["|", "\uff5c"]).join(
        respell(x, rng) if x else x for x in rng.permutation(labels)
    )


def line(text: str) -> str:
    """params.yaml allows no control characters."""
    return text.replace("\n", " ").replace("\t", " ")


def respell_table(samples: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    spelled = samples.copy()
    for name in ("study", "tissue", "cell"):
        spelled[name] = [respell(label, rng) for label in samples[name]]
    spelled["drugs"] = [respell_set(cell, rng) for cell in samples["drugs"]]
    days = ["1 day", "24 h", "24\u00a0hours", "1\u200b day"]
    spelled["time"] = [rng.choice(days) if time == "24 h" else time for time in samples["time"]]
    return spelled


def write(folder: Path, samples: pd.DataFrame, counts: np.ndarray) -> Path:
    folder.mkdir()
    samples.to_parquet(folder / "samples.parquet")
    genes = pd.DataFrame({"gene_id": [f"g{gene:02d}" for gene in range(GENES)]})
    genes.to_parquet(folder / "genes.parquet")
    with ShardWriter(folder / "counts", "part", np.dtype(np.int64)) as writer:
        writer.write(samples["sample_id"].to_numpy(), counts)
    return folder


def prepare(source: Path, params: Params, rng: np.random.Generator | None) -> Cohort:
    """With labels in params.yaml and in the side tables spelled at random too."""
    one, many = (respell, respell_set) if rng else (lambda text, _: text,) * 2
    pd.DataFrame({"label": [one(name, rng) for name in DRUGS], "feature": range(6)}).to_csv(
        source / "features.csv", index=False
    )
    targets = {"perturbation": [many("E|D", rng), one("D", rng)], "gene_id": ["g01", "g02"]}
    pd.DataFrame(targets).to_parquet(source / "targets.parquet", index=False)
    kinds = {
        "technical": {"study": {"kind": "categorical"}},
        "biological": {"tissue": {"kind": "categorical"}, "cell": {"kind": "categorical"}},
        "perturbation": {
            "drugs": {"kind": "embedding", "table": str(source / "features.csv")},
            "time": {"kind": "numeric", "scale": "log"},
        },
    }
    data = declare_data(
        params.data,
        source=str(source),
        covariates=kinds,
        context_columns=["tissue", "cell"],
        control={"column": "drugs", "value": line(one("DMSO", rng))},
        target_gene=str(source / "targets.parquet"),
        date_column=None,
        min_gene_samples=0,
    )
    listed = [{"tissue": line(one("lung / airway", rng)), "drugs": line(many("D|E", rng))}]
    splits = params.splits.model_dump() | {"validation_combination": listed, "combination": 0.2}
    folder = source.parent / f"{source.name} cohort"
    write_cohort(open_source(data), data, Splits.model_validate(splits), folder)
    return Cohort(folder)


def sets(column: pd.Series) -> list[frozenset[str]]:
    """The labels of each cell, read without the code under test."""
    cells = [unicodedata.normalize("NFKC", cell) for cell in column]
    hidden = {"\u200b", "\ufeff", "\u00ad", "\u2060", "\u200e", "\ufe0f"}
    cells = ["".join(c for c in cell if c not in hidden) for cell in cells]
    parts = [{" ".join(part.split()) for part in cell.split("|")} for cell in cells]
    return [
        frozenset(unicodedata.normalize("NFKC", label) for label in labels - {"", "DMSO"})
        for labels in parts
    ]


def leaks(spelled: pd.DataFrame, split: pd.Series) -> int:
    """Samples of held-out pairs, perturbations and studies whose entity is in a visible split."""
    table = pd.DataFrame(
        {name: sets(spelled[name]) for name in ("study", "tissue", "cell", "drugs")}
    )
    table["pair"] = list(zip(table["tissue"], table["cell"], table["drugs"], strict=True))
    table["split"], number = split.to_numpy(), 0
    for role, visible in (("validation", ["train"]), ("test", ["train", "validation"])):
        inside = table["split"].isin(visible)
        if role == "test":
            inside |= table["split"].str.startswith("validation_")
        for kind, column in (
            ("combination", "pair"),
            ("study", "study"),
            ("perturbation", "drugs"),
        ):
            held_out = table.loc[table["split"] == f"{role}_{kind}", column]
            assert len(held_out), f"{role}_{kind} is empty"
            seen = set(table.loc[inside, column])
            number += sum(entity in seen for entity in held_out)
    return number


def test_spelling_changes_no_split_and_no_entity(params, tmp_path, times, record_property):
    rng = np.random.default_rng(0)
    samples, counts = original(rng), rng.poisson(20, (SAMPLES, GENES))
    expected = prepare(write(tmp_path / "original", samples, counts), params, None)
    sizes = (expected.folder / "sizes.csv").read_text()
    for number in range(times):
        spelled = respell_table(samples, rng)
        cohort = prepare(write(tmp_path / f"spelled {number}", spelled, counts), params, rng)
        assert (cohort.samples["split"] == expected.samples["split"]).all()
        assert (cohort.folder / "sizes.csv").read_text() == sizes
        assert cohort.train_validation_sha256 == expected.train_validation_sha256
        assert cohort.targets.to_dict() == {"D|E": "g01", "D": "g02"}
        splits = cohort.samples.set_index("sample_id")["split"]
        assert leaks(spelled, splits[spelled["sample_id"]].reset_index(drop=True)) == 0
        notes = json.loads((cohort.folder / "manifest.json").read_text())["notes"]
        assert any("spellings of one label, merged" in note for note in notes)
    record_property("figure", f"{times} of {times} spellings: same splits, no leak")
