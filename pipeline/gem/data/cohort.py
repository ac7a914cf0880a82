"""The prepared cohort on disk: samples, genes, splits, counts by role, and a manifest.

samples.parquet   sample_id, the declared columns, `total` (counts over all genes of the source);
                  in the order of the shards: training, validation, test
genes.parquet     gene_id of the kept genes, in the order of the counts
splits.parquet    sample_id, split
sizes.csv         a row per split: samples, studies, contexts, perturbations, pairs, conditions,
                  controls
targets.parquet   perturbation, gene_id of a target gene, a row for each; empty if unknown
embeddings/       a table of features per embedding covariate, by its position
counts/           train-*.parquet, validation-*.parquet, test-*.parquet (never read in training),
                  in random order
truth/            parameters of the simulator, for a synthetic cohort
manifest.json     format version, declarations, integer type by role, checksums of all files and
                  of itself; written last

B samples of a block, N of the splits that are read, G genes.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field, ValidationError

from pipeline.gem.common.config import Covariates, Data, Frozen
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256, sha256_of
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.features import FeatureTable
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.splits import SPLIT_ROLES, role_of
from pipeline.gem.data.storage.parquet import read_parquet
from pipeline.gem.data.storage.reading import check_regular, file_errors

FORMAT_VERSION = 6
# Keys of params.yaml: data that later stages read.
DECLARED = (
    "covariates",
    "context_columns",
    "control",
    "target_gene",
    "date_column",
    "study_column",
    "level_column",
    "missing_values",
)
# The other keys, which matter to `prepare` only.
_UNDECLARED = {
    "layer": None,
    "sample_id": None,
    "gene_list": None,
    "highly_variable": None,
    "min_gene_samples": 0,
    "min_gene_total": 0,
    "empty_samples": "refuse",
}
TARGETS, SIZES = "targets.parquet", "sizes.csv"
TRUTH = ("truth/parameters.npz", "truth/samples.parquet")  # of a synthetic cohort
_CHANGED = "its sha256 differs: the file was changed or is damaged"
_REBUILD = "run `dvc repro --force prepare`"

Role = Literal["train", "validation", "test"]
# The patterns keep the paths inside the folder of the cohort.
_TablePath = Annotated[
    str,
    Field(pattern=r"^(sizes\.csv|(samples|genes|splits|targets|embeddings/[0-9]+)\.parquet)$"),
]
_ShardPath = Annotated[str, Field(pattern=r"^counts/[a-z]+-[0-9]{5,}\.parquet$")]


def embedding_files(covariates: Covariates) -> dict[str, str]:
    """Path within the cohort by embedding covariate: by position, as any text may name a column."""
    names = covariates.embeddings()
    return {name: f"embeddings/{position}.parquet" for position, name in enumerate(names)}


class StoredFile(Frozen):
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> dict:
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}


class Manifest(Frozen):
    """The schema of manifest.json, validated before any file that it names is opened."""

    sha256: str  # of all other keys
    format_version: int
    samples: int
    genes: int
    gene_list_sha256: str
    integer_type: dict[Role, Literal["uint8", "uint16", "uint32"]]
    declared: dict
    splits: dict[str, int]
    missing: dict[str, int]
    notes: list[str]
    tables: dict[_TablePath, StoredFile]
    truth: dict[Literal[TRUTH], StoredFile]
    shards: dict[Role, dict[_ShardPath, StoredFile]]


def with_checksum(manifest: dict) -> dict:
    """The manifest with a checksum of its content."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return {"sha256": sha256_of(content)} | content


class Cohort:
    """A prepared cohort, opened for reading. IntegrityError if a file contradicts the manifest."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest, self.declared = self._read_manifest()
        self._verify_tables()
        self.samples = self._read_samples()
        self.samples["split"] = self._read("splits.parquet")["split"].to_numpy()
        self.genes = self._read("genes.parquet")["gene_id"].to_numpy(dtype=object)
        self.features = {
            name: FeatureTable.read(self.folder / file)
            for name, file in embedding_files(self.declared.covariates).items()
        }
        self.targets = self._read(TARGETS).set_index("perturbation")["gene_id"]

    def _read_manifest(self) -> tuple[dict, Data]:
        """(manifest, its declarations), both validated."""
        path = self.folder / "manifest.json"
        if not path.exists():
            raise InputError(f"{path}: absent; `dvc repro prepare` writes the cohort")
        check_regular(path, IntegrityError)
        with file_errors(path, _REBUILD, IntegrityError, "JSON"):
            manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise IntegrityError(
                f"{path}: format version {version}, expected {FORMAT_VERSION}; {_REBUILD}"
            )
        try:
            declared = Manifest.model_validate(manifest).declared
            if with_checksum(manifest)["sha256"] != manifest["sha256"]:
                raise IntegrityError(f"{path}: {_CHANGED}; {_REBUILD}")
            data = {**_UNDECLARED, "source": str(self.folder), **declared}
            return manifest, Data.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise IntegrityError(f"{path}: {key}: {problem['msg']}; {_REBUILD}") from None

    def _verify_tables(self) -> None:
        """The manifest lists exactly the expected tables, and their checksums match."""
        expected = {
            "samples.parquet",
            "genes.parquet",
            "splits.parquet",
            TARGETS,
            SIZES,
            *embedding_files(self.declared.covariates).values(),
        }
        listed = set(self.manifest["tables"])
        if listed != expected:
            raise IntegrityError(
                f"{self.folder / 'manifest.json'}: tables: missing or unexpected: "
                f"{examples(sorted(listed ^ expected))}; {_REBUILD}"
            )
        self._verify(self.manifest["tables"])

    def _verify(self, files: dict[str, dict]) -> None:
        for name, stored in files.items():
            path = self.folder / name
            if not path.exists():
                raise IntegrityError(
                    f"{path}: absent, though the manifest lists it; run `dvc repro prepare`"
                )
            check_regular(path, IntegrityError)
            if path.stat().st_size != stored["bytes"] or sha256(path) != stored["sha256"]:
                raise IntegrityError(f"{path}: {_CHANGED}; {_REBUILD}")

    def _read(self, name: str) -> pd.DataFrame:
        table, _ = read_parquet(self.folder / name, advice=_REBUILD, error=IntegrityError)
        return table.to_pandas()

    def _read_samples(self) -> pd.DataFrame:
        """Text but the names of samples as categories: a cell takes one to four bytes, not eight,
        and 60 for each text that is not shared."""
        table, _ = read_parquet(
            self.folder / "samples.parquet", advice=_REBUILD, error=IntegrityError
        )
        for position, field in enumerate(table.schema):
            if field.name != "sample_id" and pa.types.is_string(field.type):
                column = table.column(position).combine_chunks().dictionary_encode()
                table = table.set_column(position, field.name, column)
        return table.to_pandas(split_blocks=True, self_destruct=True)

    @cached_property
    def truth_folder(self) -> Path | None:
        """Of a synthetic cohort, unless it was removed. IntegrityError if a file is damaged."""
        folder = self.folder / "truth"
        if not self.manifest["truth"] or not folder.exists():
            return None
        self._verify(self.manifest["truth"])
        return folder

    def has(self, split: str) -> bool:
        return self.manifest["splits"].get(split, 0) > 0

    def rows(self, splits: Sequence[str]) -> pd.DataFrame:
        """Samples of the splits, in cohort order."""
        return self.samples[self.samples["split"].isin(splits)]

    def integer_type(self, splits: Sequence[str]) -> np.dtype:
        """The smallest type of the counts of the splits."""
        roles = {role_of(split) for split in splits}
        return np.result_type(*(self.manifest["integer_type"][role] for role in roles))

    def blocks(self, splits: Sequence[str]) -> Iterator[np.ndarray]:
        """Counts (B, G) of `rows(splits)`, block after block. Opens only the shards of their roles.

        IntegrityError if the shards do not hold the samples of the table in its order.
        """
        names = self.samples["sample_id"].to_numpy()
        inside = self.samples["split"].isin(splits).to_numpy()
        for role, (start, stop) in self._role_rows().items():
            if role not in map(role_of, splits):
                continue
            for path in self.shards(role):
                for sample_ids, counts in read_shard(path, len(self.genes)):
                    rows = slice(start, start + len(sample_ids))
                    start = rows.stop
                    if not np.array_equal(names[rows], sample_ids):
                        raise IntegrityError(
                            f"{path}: its samples are not those of samples.parquet in its order; "
                            f"{_REBUILD}"
                        )
                    kept = inside[rows]
                    if kept.any():
                        yield counts if kept.all() else counts[kept]
            if start != stop:
                raise IntegrityError(
                    f"{self.folder}: no counts for samples {examples(names[start:stop])}; "
                    f"{_REBUILD}"
                )

    def shards(self, role: Role) -> list[Path]:
        """The files of a role in order. IntegrityError if one is damaged; each is verified once."""
        stored = self.manifest["shards"][role]
        for name in stored.keys() - self._verified:
            self._verify({name: stored[name]})
            self._verified.add(name)
        return [self.folder / name for name in stored]

    @cached_property
    def _verified(self) -> set[str]:
        """Names of the shards whose checksums match."""
        return set()

    def _role_rows(self) -> dict[Role, tuple[int, int]]:
        """The first row of each role in `samples`, and the one after the last."""
        sizes = self.manifest["splits"]
        numbers = [sum(sizes.get(split, 0) for split in splits) for splits in SPLIT_ROLES.values()]
        stops = np.cumsum(numbers).tolist()
        return dict(zip(SPLIT_ROLES, zip([0, *stops], stops, strict=False), strict=True))

    def counts(self, splits: Sequence[str], chosen: np.ndarray | None = None) -> np.ndarray:
        """(N, G) counts of `rows(splits)`, in memory; of the `chosen` (bool, one per row) alone."""
        if chosen is None:
            chosen = np.ones(len(self.rows(splits)), dtype=bool)
        counts = np.empty((chosen.sum(), len(self.genes)), dtype=self.integer_type(splits))
        row = start = 0
        for block in self.blocks(splits):
            kept = block[chosen[row : row + len(block)]]
            counts[start : start + len(kept)] = kept
            row, start = row + len(block), start + len(kept)
        return counts

    def expression(self, splits: Sequence[str]) -> np.ndarray:
        """(N, G) float32 log-CPM of `rows(splits)`, relative to totals over all source genes."""
        return log_cpm(self.counts(splits), self.rows(splits)["total"].to_numpy())

    def expression_blocks(
        self, splits: Sequence[str], chosen: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """`expression`, block after block (B, G); of the `chosen` as in `counts`."""
        totals, start = self.rows(splits)["total"].to_numpy(), 0
        for block in self.blocks(splits):
            rows = slice(start, start + len(block))
            kept = slice(None) if chosen is None else chosen[rows]
            yield log_cpm(block[kept], totals[rows][kept])
            start = rows.stop

    @cached_property
    def train_validation_sha256(self) -> str:
        """A hash of all that training and model selection use. No test sample changes it."""
        rows = self.samples[self.samples["split"].map(role_of) != "test"]
        data = self.declared
        names = ["sample_id", "split", "total", *data.covariates.all(), *data.context_columns]
        names += [name for name in (data.date_column, data.study_column) if name]
        names += [data.control.column] if data.control else []
        # As text, which does not depend on how the source stores a column.
        table = {name: label_texts(rows[name]).tolist() for name in names}
        shards = [
            shard["sha256"]
            for role in ("train", "validation")
            for shard in self.manifest["shards"][role].values()
        ]
        tables = {
            name: table["sha256"]
            for name, table in self.manifest["tables"].items()
            if name.startswith((TARGETS, "embeddings/"))
        }
        return sha256_of(
            self.manifest["gene_list_sha256"], self.manifest["declared"], tables, shards, table
        )
