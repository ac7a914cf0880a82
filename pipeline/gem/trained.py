"""A trained GEM: the network with all that prediction needs, in one file.

N samples, G genes. Expression is log-CPM.
"""

import io
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.cohort import Cohort
from pipeline.gem.config import GROUPS, Model
from pipeline.gem.errors import InputError, IntegrityError
from pipeline.gem.expression import counts_from_log_cpm
from pipeline.gem.labels import label_texts
from pipeline.gem.likelihood import sample_normal
from pipeline.gem.metadata import MetadataEncoder
from pipeline.gem.model import CONDITIONED, NEW_STUDY, PREDICTED, Gaussian, Network
from pipeline.gem.observation import Observed
from pipeline.gem.storage import write_atomically

FORMAT_VERSION = 2
CONDITIONING = ("technical", "biological")  # groups taken from a reference where not said otherwise
_ROWS = 4096  # decoded at a time


@dataclass(frozen=True)
class Targets:
    """Which gene a perturbation itself hits, and the column that names the perturbation."""

    column: str | None
    genes: dict[str, int]    # perturbation to position among the genes

    @classmethod
    def of(cls, cohort: Cohort) -> "Targets":
        if cohort.declared.control is None:
            return cls(None, {})
        positions = {gene: position for position, gene in enumerate(cohort.genes)}
        return cls(cohort.declared.control.column, {name: positions[gene] for name, gene in cohort.targets.items() if gene in positions})

    def __call__(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) int64 position of each sample's target gene, -1 without."""
        if self.column is None or self.column not in samples:
            return np.full(len(samples), -1)
        return label_texts(samples[self.column]).map(self.genes).fillna(-1).to_numpy(dtype=np.int64)


class Query(NamedTuple):
    """What the decoder needs to know of N samples."""

    latents: Gaussian             # (N, L)
    target: Tensor                # (N,) position of the gene that the perturbation itself hits, -1 without
    change: Tensor                # (N,) what that does to it, log-CPM
    way: Tensor                   # (N,) how each is decoded, which decides its noise: PREDICTED, NEW_STUDY or CONDITIONED
    carried: Tensor | None = None # (N, G) what is carried over of a reference's residual, log-CPM

    def rows(self, chosen: slice) -> "Query":
        carried = None if self.carried is None else self.carried[chosen]
        return Query(self.latents.rows(chosen), self.target[chosen], self.change[chosen], self.way[chosen], carried)


def decode(network: Network, query: Query, latents: Tensor) -> Tensor:
    """(N, G) log-CPM of latents (N, L) drawn for a query."""
    decoded = network.hit(network.decode(latents), query.target, query.change)
    return decoded if query.carried is None else decoded + query.carried


@dataclass(frozen=True)
class GEM:
    """Predicts expression from metadata, and from a reference sample; encodes samples."""

    network: Network
    metadata: MetadataEncoder
    genes: np.ndarray        # (G,) gene ids, in the order of every expression matrix
    targets: Targets
    params: Model
    hidden_study: str | None   # the study's column, where training hid it and so knows the noise of a study never seen

    @classmethod
    def build(cls, genes: np.ndarray, metadata: MetadataEncoder, targets: Targets, params: Model, hidden_study: str | None = None) -> "GEM":
        """An untrained GEM; weights from torch's current random state."""
        heads = {field.name: (metadata.group_of(field.name), len(field.levels)) for field in metadata.heads()}
        fields = metadata.groups["perturbation"]
        manner = tuple(field.name != targets.column and field.features is None for field in fields for _ in range(field.size))
        return cls(Network(len(genes), metadata.sizes, heads, manner, params), metadata, genes, targets, params, hidden_study)

    def to_bytes(self) -> bytes:
        """The content of model.pt: tensors and plain values only. The same model gives the same bytes."""
        described = {
            "format_version": FORMAT_VERSION,
            "genes": [str(gene) for gene in self.genes],
            "metadata": self.metadata.state(),
            "targets": {"column": self.targets.column, "genes": self.targets.genes},
            "model": self.params.model_dump(mode="json"),
            "hidden_study": self.hidden_study,
        }
        content = _plain(described | {"weights": {name: value.detach().cpu() for name, value in self.network.state_dict().items()}})
        # Through a buffer: torch.save writes the name of the file it is given into the bytes.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> "GEM":
        """From a model directory or a model file. InputError where it is absent, IntegrityError where it is no GEM."""
        path = Path(path)
        path = path / "model.pt" if path.is_dir() else path
        if not path.exists():
            raise InputError(f"{path}: absent; `dvc repro` trains it")
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch reads a flipped bit without complaint
            if damaged:
                raise IntegrityError(f"{path}: {damaged} inside it is damaged; train the model again")
            content = torch.load(path, weights_only=True, map_location="cpu")
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise IntegrityError(f"{path}: not a GEM model file ({reason}); train the model again") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise IntegrityError(f"{path}: format version {version}, expected {FORMAT_VERSION}; train the model again")
        with torch.random.fork_rng(devices=[]):
            encoder, params = MetadataEncoder.from_state(content["metadata"]), Model.model_validate(content["model"])
            gem = cls.build(np.array(content["genes"]), encoder, Targets(**content["targets"]), params, content["hidden_study"])
        try:
            gem.network.load_state_dict(content["weights"])
        except RuntimeError as error:
            raise IntegrityError(f"{path}: its weights do not fit its configuration: {' '.join(str(error).split())}") from None
        gem.network.eval()
        return gem

    def require_genes(self, genes: np.ndarray) -> None:
        """IntegrityError, with the difference, where `genes` are not this model's genes in this order."""
        if np.array_equal(self.genes, genes):
            return
        missing, surplus = sorted(set(self.genes) - set(genes)), sorted(set(genes) - set(self.genes))
        raise IntegrityError(
            f"the model knows {len(self.genes)} genes, the data has {len(genes)}: {len(missing)} missing {missing[:5]}, "
            f"{len(surplus)} unknown {surplus[:5]}{', in another order' if not missing and not surplus else ''}; train on this cohort"
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def posterior(self, expression: np.ndarray) -> Gaussian:
        """q(z | x) for log-CPM (N, G)."""
        parts = [self.network.posterior(block.to(self.device)) for block in torch.from_numpy(expression).split(_ROWS)]
        return Gaussian(torch.cat([part.mean for part in parts]), torch.cat([part.log_variance for part in parts]))

    @torch.no_grad()
    def query(
        self, samples: pd.DataFrame, reference: np.ndarray | None = None, conditioning: tuple[str, ...] = CONDITIONING, unknown: str = "refuse"
    ) -> Query:
        """N rows of metadata as the decoder sees them; for the groups in `conditioning` from reference expression (N, G).

        `unknown` as in MetadataEncoder.encode. InputError for a group in `conditioning` that does not exist.
        """
        strange = [group for group in conditioning if group not in GROUPS]
        if strange:
            raise InputError(f"conditioning: unknown groups {strange}; known: {', '.join(GROUPS)}")
        encoded = self.metadata.encode(samples, unknown)
        metadata, index = {}, {}
        for group in GROUPS:
            rows, inverse = distinct_rows(encoded[group])
            metadata[group], index[group] = torch.from_numpy(rows).to(self.device), torch.from_numpy(inverse).to(self.device)
        prior = self.network.joint_prior(metadata, index)
        change = self.network.own_target(metadata["perturbation"])[index["perturbation"]]
        target = torch.from_numpy(self.targets(samples)).to(self.device)
        if reference is None or not conditioning:
            return Query(prior, target, change, self._ways(encoded["technical"]))
        posterior, expression = self.posterior(reference), torch.from_numpy(reference).to(self.device)
        carried = torch.cat(
            [self.network.carried(expression[rows], posterior.rows(rows)) for rows in _blocks(len(samples))] or [expression]
        )
        return Query(self.network.conditioned(prior, posterior, conditioning), target, change, torch.full_like(target, CONDITIONED), carried)

    def _ways(self, technical: np.ndarray) -> Tensor:
        """(N,) NEW_STUDY where training hid studies and the encoded technical metadata (N, D) tell none; else PREDICTED."""
        columns = [field.name == self.hidden_study for field in self.metadata.groups["technical"] for _ in range(field.size)]
        unknown = ~technical[:, np.array(columns, dtype=bool)].any(axis=1) & any(columns)
        return torch.from_numpy(np.where(unknown, NEW_STUDY, PREDICTED)).to(self.device)

    @torch.no_grad()
    def generate(
        self,
        samples: pd.DataFrame,
        reference: np.ndarray | None = None,
        conditioning: tuple[str, ...] = CONDITIONING,
        *,
        draw_latents: bool = False,
        draw_observations: bool = False,
        totals: np.ndarray | None = None,
        generator: torch.Generator | None = None,
        unknown: str = "refuse",
    ) -> np.ndarray:
        """(N, G) log-CPM of a query, from metadata or from a reference: the mean, or draws of latents and of noise.

        Draws need a `generator`, those of counts the `totals` (N,) of the samples; ValueError without one.
        """
        if (draw_latents or draw_observations) and generator is None:
            raise ValueError("draws need a torch.Generator")
        if draw_observations and totals is None and self.params.counted:
            raise ValueError("draws of counts need the total counts of the samples")
        query = self.query(samples, reference, conditioning, unknown)
        result = np.empty((len(samples), len(self.genes)), dtype=np.float32)
        for rows in _blocks(len(samples)):
            part = query.rows(rows)
            decoded = decode(self.network, part, sample_normal(*part.latents, generator) if draw_latents else part.latents.mean)
            if draw_observations:
                said = self.network.observation.draw_log_cpm(decoded, None if totals is None else torch.from_numpy(totals[rows]), part.way, generator)
            else:
                said = self.network.observation.log_cpm(decoded)
            result[rows] = said.cpu().numpy()
        return result

    def generate_counts(self, samples: pd.DataFrame, totals: np.ndarray, reference: np.ndarray | None = None, **how) -> np.ndarray:
        """(N, G) whole counts whose rows sum exactly to `totals` (N,); `how` as in `generate`."""
        return counts_from_log_cpm(self.generate(samples, reference, totals=totals, **how), totals)

    @torch.no_grad()
    def expect(self, query: Query, draws: int, seed: int) -> np.ndarray:
        """(N, G) log-CPM averaged over `draws` of the latents: the mean prediction."""
        generator = torch.Generator(self.device).manual_seed(seed)
        result = np.empty((len(query.target), len(self.genes)), dtype=np.float32)
        for rows in _blocks(len(query.target)):
            part = query.rows(rows)
            total = sum(self.network.observation.log_cpm(decode(self.network, part, sample_normal(*part.latents, generator))) for _ in range(draws))
            result[rows] = (total / draws).cpu().numpy()
        return result


@torch.no_grad()
def predictive_log_likelihood(network: Network, observed: Observed, query: Query, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """((N,) nats, (N, G) mean of what is decoded): log mean_k p(x | z_k) over draws z_k of the prior.

    Draws z_k are those of the query's latents. The mean of the likelihoods, not of their logarithms: that would reward a prior without spread.
    """
    log_likelihoods, total = [], torch.zeros_like(observed.expression)
    for _ in range(draws):
        decoded = decode(network, query, sample_normal(*query.latents, generator))
        log_likelihoods.append(network.observation.log_likelihood(observed, decoded, PREDICTED))
        total += decoded
    stacked = torch.stack(log_likelihoods)
    return stacked.logsumexp(dim=0) - torch.tensor(float(draws)).log(), total / draws


def _plain(value: object) -> object:
    """Arrays as tensors, which torch loads with weights_only; equal texts as one object: pickle writes a second one by reference."""
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, str):
        return sys.intern(str(value))
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def distinct_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows (U, D), index (N,) of each row among them)."""
    if matrix.shape[1] == 0 or len(matrix) == 0:
        return matrix[:1], np.zeros(len(matrix), dtype=np.int64)
    rows, inverse = np.unique(matrix, axis=0, return_inverse=True)
    return rows, inverse.reshape(-1)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))
