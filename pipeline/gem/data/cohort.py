"""The validated cohort on disk: samples, genes, splits, counts by role, and a manifest written last.

samples.parquet   sample_id, the source's columns, `total` (counts over all genes of the source)
genes.parquet     gene_id of the kept genes, in the order of the counts
splits.parquet    sample_id, split
sizes.csv         a row per split: samples, studies, contexts, perturbations, pairs, controls
targets.parquet   perturbation, gene_id of the gene it hits; empty where nothing is known
embeddings/       features by label, a table for each covariate of that kind
counts/           train-*.parquet, validation-*.parquet, test-*.parquet: training never opens the last
truth/            the simulator's parameters, for a synthetic cohort
manifest.json     format version, declarations, integer type by role, checksums
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError

from pipeline.gem.common.config import FILE_NAME, Data, Frozen
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256, sha256_of
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.splits import role_of

FORMAT_VERSION = 3
DECLARED = (
    "covariates",
    "context_columns",
    "control",
    "target_gene",
    "date_column",
    "study_column",
)  # of params.yaml: data
# What no later stage reads: how a source was read and chosen from.
UNDECLARED = dict.fromkeys(("layer", "sample_id", "gene_list", "highly_variable")) | {
    "min_gene_samples": 0,
    "min_gene_total": 0,
    "empty_samples": "refuse",
}

TARGETS = "targets.parquet"

Role = Literal["train", "validation", "test"]


def embedding_file(name: str) -> str:
    return f"embeddings/{name}.parquet"


class Shard(Frozen):
    path: Annotated[
        str, Field(pattern=r"^counts/[a-z]+-[0-9]{5,}\.parquet$")
    ]  # no way out of the folder
    bytes: int
    sha256: str


class Manifest(Frozen):
    """The shape of manifest.json, checked before anything that it names is opened."""

    format_version: int
    samples: int
    genes: int
    gene_list_sha256: str
    integer_type: dict[Role, Literal["uint8", "uint16", "uint32"]]
    declared: dict
    splits: dict[str, int]
    missing: dict[str, int]
    notes: list[str]
    tables: dict[
        Annotated[
            str, Field(pattern=rf"^(samples|genes|splits|targets|embeddings/{FILE_NAME})\.parquet$")
        ],
        str,
    ]
    shards: dict[Role, list[Shard]]


class Cohort:
    """A prepared cohort, opened for reading. IntegrityError where a file is not what the manifest says."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest, self.declared = self._read_manifest()
        self._verify_tables()
        self.samples = pd.read_parquet(self.folder / "samples.parquet")
        self.samples["split"] = pd.read_parquet(self.folder / "splits.parquet")["split"].to_numpy()
        self.genes = pd.read_parquet(self.folder / "genes.parquet")["gene_id"].to_numpy(dtype=str)
        self.features = {
            name: FeatureTable.read(self.folder / embedding_file(name))
            for name in self.declared.covariates.embeddings()
        }
        self.targets = pd.read_parquet(self.folder / TARGETS).set_index("perturbation")["gene_id"]

    def _read_manifest(self) -> tuple[dict, Data]:
        """(manifest, what it declares), both checked."""
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: absent; `dvc repro prepare` writes the cohort") from None
        except ValueError as error:
            raise IntegrityError(
                f"{path}: not JSON ({error}); run `dvc repro --force prepare`"
            ) from None
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        if found != FORMAT_VERSION:
            raise IntegrityError(
                f"{path}: format version {found}, expected {FORMAT_VERSION}; run `dvc repro --force prepare`"
            )
        try:
            return manifest, Data.model_validate(
                UNDECLARED
                | {"source": str(self.folder)}
                | Manifest.model_validate(manifest).declared
            )
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise IntegrityError(
                f"{path}: {key}: {problem['msg']}; run `dvc repro --force prepare`"
            ) from None

    def _verify_tables(self) -> None:
        """Every table that is read is listed, and is what the manifest says."""
        wanted = {
            "samples.parquet",
            "genes.parquet",
            "splits.parquet",
            TARGETS,
            *map(embedding_file, self.declared.covariates.embeddings()),
        }
        listed = set(self.manifest["tables"])
        if listed != wanted:
            strange = examples(sorted(listed ^ wanted))
            raise IntegrityError(
                f"{self.folder / 'manifest.json'}: tables: {strange} should not be, or not be absent; run `dvc repro --force prepare`"
            )
        self._verify(self.manifest["tables"])

    def _verify(self, expected: dict[str, str]) -> None:
        for name, checksum in expected.items():
            path = self.folder / name
            if not path.exists():
                raise IntegrityError(
                    f"{path}: absent, though the manifest lists it; run `dvc repro prepare`"
                )
            if sha256(path) != checksum:
                raise IntegrityError(
                    f"{path}: its sha256 is not the manifest's: the file changed or is damaged; run `dvc repro --force prepare`"
                )

    @property
    def truth_folder(self) -> Path | None:
        folder = self.folder / "truth"
        return folder if (folder / "parameters.npz").exists() else None

    def has(self, split: str) -> bool:
        return self.manifest["splits"].get(split, 0) > 0

    def rows(self, splits: Sequence[str]) -> pd.DataFrame:
        """Samples of the named splits, in cohort order."""
        return self.samples[self.samples["split"].isin(splits)]

    def counts(self, splits: Sequence[str]) -> np.ndarray:
        """(N, G) counts of `rows(splits)`. Only shards of their roles are opened."""
        names = self.rows(splits)["sample_id"].to_numpy()
        position = pd.Series(np.arange(len(names)), index=names)
        found = np.zeros(len(names), dtype=bool)
        roles = dict.fromkeys(role_of(split) for split in splits)
        counts = np.empty(
            (len(names), len(self.genes)),
            dtype=np.result_type(*(self.manifest["integer_type"][role] for role in roles)),
        )
        for role in roles:
            for shard in self.manifest["shards"][role]:
                self._verify({shard["path"]: shard["sha256"]})
                for ids, block in read_shard(self.folder / shard["path"], len(self.genes)):
                    target = position.reindex(ids).to_numpy()
                    wanted = ~np.isnan(target)
                    counts[target[wanted].astype(np.int64)] = block[wanted]
                    found[target[wanted].astype(np.int64)] = True
        if not found.all():
            raise IntegrityError(
                f"{self.folder}: no counts for samples {examples(names[~found])}; run `dvc repro --force prepare`"
            )
        return counts

    def expression(self, splits: Sequence[str]) -> np.ndarray:
        """(N, G) float32 log-CPM of `rows(splits)`, by totals over all genes of the source."""
        return log_cpm(self.counts(splits), self.rows(splits)["total"].to_numpy())

    @cached_property
    def train_validation_sha256(self) -> str:
        """A hash of what training and choices may see, row by row: it does not move when a test sample does."""
        rows = self.samples[self.samples["split"].map(role_of) != "test"]
        declared = self.declared
        named = [
            *declared.covariates.all(),
            *declared.context_columns,
            declared.date_column,
            declared.study_column,
        ]
        columns = dict.fromkeys(
            [
                "sample_id",
                "split",
                "total",
                *filter(None, named),
                *([declared.control.column] if declared.control else []),
            ]
        )
        # As text, which does not depend on how the source stored a column.
        table = {name: label_texts(rows[name]).tolist() for name in columns}
        shards = [
            shard["sha256"]
            for role in ("train", "validation")
            for shard in self.manifest["shards"][role]
        ]
        tables = {
            name: digest
            for name, digest in self.manifest["tables"].items()
            if name.startswith((TARGETS, "embeddings/"))
        }
        return sha256_of(
            self.manifest["gene_list_sha256"], self.manifest["declared"], tables, shards, table
        )
