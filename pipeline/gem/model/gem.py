"""A trained GEM: the network with all that prediction needs, in one file.

N samples, G genes. Expression is log-CPM.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Model
from pipeline.gem.common.errors import InputError, IntegrityError, examples
from pipeline.gem.common.files import sha256_of, write_atomically
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import label_texts
from pipeline.gem.model.calibration import fit_temperature, probabilities
from pipeline.gem.model.model_file import check_weights, pack, unpack
from pipeline.gem.model.network import PRIOR, REFERENCE_SAMPLE, UNSEEN_STUDY, Gaussian, Network
from pipeline.gem.model.normal import sample_normal
from pipeline.gem.model.observation import Observed
from pipeline.gem.model.training_support import TrainingSupport

CONDITIONING = ("technical", "biological")  # groups taken from a reference where not said otherwise
_ROWS = 4096  # decoded at a time


@dataclass(frozen=True)
class TargetGenes:
    """Which gene a perturbation itself hits, and the column that names the perturbation."""

    column: str | None
    genes: dict[str, int]  # perturbation to position among the genes

    @classmethod
    def of(cls, cohort: Cohort) -> "TargetGenes":
        if cohort.declared.control is None:
            return cls(None, {})
        positions = {gene: position for position, gene in enumerate(cohort.genes)}
        return cls(
            cohort.declared.control.column,
            {name: positions[gene] for name, gene in cohort.targets.items() if gene in positions},
        )

    def __call__(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) int64 position of each sample's target gene, -1 without."""
        if self.column is None or self.column not in samples:
            return np.full(len(samples), -1)
        return label_texts(samples[self.column]).map(self.genes).fillna(-1).to_numpy(dtype=np.int64)


class Query(NamedTuple):
    """What the decoder needs to know of N samples."""

    latents: Gaussian  # (N, L)
    target: Tensor  # (N,) position of the gene that the perturbation itself hits, -1 without
    change: Tensor  # (N,) what that does to it, log-CPM
    way: Tensor  # (N,) how each is decoded, which decides its noise: PREDICTED, NEW_STUDY or CONDITIONED
    carried: Tensor | None = None  # (N, G) what is carried over of a reference's residual, log-CPM
    level: Tensor | None = (
        None  # (N, 3) number of each group's distinct metadata, which alone says the latents; None: they do not
    )

    def rows(self, chosen: slice | Tensor) -> "Query":
        return Query(
            self.latents.rows(chosen),
            *(None if part is None else part[chosen] for part in self[1:]),
        )


def decode(network: Network, query: Query, latents: Tensor) -> Tensor:
    """(N, G) log-CPM of latents (N, L) drawn for a query."""
    return complete(network.decode(latents), query, slice(None))


def complete(decoded: Tensor, query: Query, rows: slice | Tensor) -> Tensor:
    """What is decoded (N, G) for rows of a query, with what does not pass through latents: the change of the target gene, as
    Network.hit but in place, and what is carried over."""
    target = query.target[rows]
    hit = (target >= 0).nonzero().squeeze(1)
    decoded[hit, target[hit]] += query.change[rows][hit]
    return decoded if query.carried is None else decoded.add_(query.carried[rows])


@dataclass(frozen=True)
class TrainedGEM:
    """Predicts expression from metadata, and from a reference sample; encodes samples."""

    network: Network
    metadata: MetadataEncoder
    genes: np.ndarray  # (G,) gene ids, in the order of every expression matrix
    targets: TargetGenes
    params: Model
    hidden_study: (
        str | None
    )  # the study's column, where training hid it and so knows the noise of a study never seen
    seen: TrainingSupport  # what training saw together
    temperatures: Mapping[str, float] = field(default_factory=dict)  # by head, of its probabilities

    @classmethod
    def build(
        cls,
        genes: np.ndarray,
        metadata: MetadataEncoder,
        targets: TargetGenes,
        params: Model,
        hidden_study: str | None = None,
        seen: TrainingSupport = TrainingSupport(),  # noqa: B008 (frozen)
    ) -> "TrainedGEM":
        """An untrained GEM; weights from torch's current random state."""
        heads = {
            field.name: (metadata.group_of(field.name), len(field.levels))
            for field in metadata.heads()
        }
        fields = metadata.groups["perturbation"]
        intervention_columns = tuple(
            field.name != targets.column and field.features is None
            for field in fields
            for _ in range(field.size)
        )
        network, temperatures = (
            Network(len(genes), metadata.sizes, heads, intervention_columns, params),
            dict.fromkeys(heads, 1.0),
        )
        return cls(network, metadata, genes, targets, params, hidden_study, seen, temperatures)

    def to_bytes(self) -> bytes:
        """The content of model.pt: tensors and plain values only. The same model gives the same bytes."""
        genes = [str(gene) for gene in self.genes]
        return pack(
            {
                "genes": genes,
                "gene_list_sha256": sha256_of(genes),
                "metadata": self.metadata.state(),
                "targets": {"column": self.targets.column, "genes": self.targets.genes},
                "model": self.params.model_dump(mode="json"),
                "hidden_study": self.hidden_study,
                "seen": asdict(self.seen),
                "temperatures": dict(self.temperatures),
                "weights": {
                    name: value.detach().cpu().contiguous()
                    for name, value in self.network.state_dict().items()
                },
            }
        )

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> "TrainedGEM":
        """From a model directory or a model file. InputError where it is absent, IntegrityError where it is no GEM."""
        path = Path(path)
        path = path / "model.pt" if path.is_dir() else path
        contents, content = unpack(path)
        encoder, seen = MetadataEncoder.from_state(content["metadata"]), contents.seen
        known = TrainingSupport(
            tuple(seen.columns),
            tuple(seen.several),
            seen.control and tuple(seen.control),
            tuple(map(tuple, seen.combinations)),
        )
        described = (
            np.array(contents.genes),
            encoder,
            TargetGenes(**content["targets"]),
            contents.model,
            contents.hidden_study,
            known,
        )
        with torch.random.fork_rng(devices=[]):
            # First without memory: a file may declare a network that no machine could hold.
            try:
                with torch.device("meta"):
                    expected = cls.build(*described)
            except (RuntimeError, OverflowError) as error:
                reason = next(iter(str(error).splitlines()), "")
                raise IntegrityError(
                    f"{path}: its weights do not fit its configuration: {reason}; train the model again"
                ) from None
            check_weights(path, contents.weights, expected.network.state_dict())
            if set(contents.temperatures) != set(expected.temperatures):
                raise IntegrityError(
                    f"{path}: temperatures of other heads than {examples(expected.temperatures)}; train the model again"
                )
            gem = replace(cls.build(*described), temperatures=contents.temperatures)
        gem.network.load_state_dict(contents.weights)
        gem.network.eval()
        return gem

    @classmethod
    def load_seeds(cls, directory: Path | str) -> tuple[list["TrainedGEM"], list[int]]:
        """(the models of a model directory, their training seeds), model.pt first. IntegrityError where they do not belong together."""
        listing = Path(directory) / "seeds" / "seeds.json"
        models = [cls.load(directory)]
        if not listing.exists():
            raise InputError(
                f"{listing}: absent; `dvc repro` trains the models and says their seeds"
            )
        seeds = json.loads(listing.read_text())
        for seed in seeds["others"]:
            path = listing.parent / f"{int(seed)}.pt"
            models.append(cls.load(path))
            models[-1].require_genes(models[0].genes, f"{path}: ")
            models[-1].require_vocabulary(models[0].metadata, f"{path}: ")
        return models, [seeds["model.pt"], *seeds["others"]]

    def require_genes(self, genes: np.ndarray, where: str = "") -> None:
        """IntegrityError, with the difference, where `genes` are not this model's genes in this order."""
        if np.array_equal(self.genes, genes):
            return
        missing, surplus = (
            sorted(set(self.genes) - set(genes)),
            sorted(set(genes) - set(self.genes)),
        )
        raise IntegrityError(
            f"{where}the model knows {len(self.genes)} genes, the data has {len(genes)}: {len(missing)} missing {missing[:5]}, "
            f"{len(surplus)} unknown {surplus[:5]}{', in another order' if not missing and not surplus else ''}; train on this cohort"
        )

    def require_vocabulary(self, metadata: MetadataEncoder, where: str = "") -> None:
        """IntegrityError, with the differences, where `metadata` is not what this model learnt of the covariates."""
        differences = self.metadata.differences(metadata)
        if differences:
            raise IntegrityError(
                *(f"{where}{difference}; train on this cohort" for difference in differences)
            )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def posterior(self, expression: np.ndarray) -> Gaussian:
        """q(z | x) for log-CPM (N, G)."""
        parts = [
            self.network.posterior(block.to(self.device))
            for block in torch.from_numpy(expression).split(_ROWS)
        ]
        return Gaussian(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.log_variance for part in parts]),
        )

    @torch.no_grad()
    def query(
        self,
        samples: pd.DataFrame,
        reference: np.ndarray | None = None,
        conditioning: tuple[str, ...] = CONDITIONING,
        unknown: str = "refuse",
        chosen: np.ndarray | None = None,
    ) -> Query:
        """N rows of metadata as the decoder sees them; for the groups in `conditioning` from reference expression (R, G).

        `chosen` (N,) is the row of the reference for each sample; None: its own. `unknown` as in MetadataEncoder.encode.
        InputError for a group in `conditioning` that does not exist.
        """
        strange = [group for group in conditioning if group not in GROUPS]
        if strange:
            raise InputError(f"conditioning: unknown groups {strange}; known: {', '.join(GROUPS)}")
        encoded = self.metadata.encode(samples, unknown)
        metadata, index = {}, {}
        for group in GROUPS:
            rows, inverse = distinct_rows(encoded[group])
            metadata[group], index[group] = (
                torch.from_numpy(rows).to(self.device),
                torch.from_numpy(inverse).to(self.device),
            )
        prior = self.network.joint_prior(metadata, index)
        change = self.network.target_effect(metadata["perturbation"])[index["perturbation"]]
        target = torch.from_numpy(self.targets(samples)).to(self.device)
        if reference is None or not conditioning:
            level = torch.stack([index[group] for group in GROUPS], dim=1)
            return Query(prior, target, change, self._ways(encoded["technical"]), level=level)
        posterior, expression = (
            self.posterior(reference),
            torch.from_numpy(reference).to(self.device),
        )
        carried = torch.cat(
            [
                self.network.carried(expression[rows], posterior.rows(rows))
                for rows in _blocks(len(expression))
            ]
            or [expression]
        )
        if chosen is not None:
            rows = torch.from_numpy(chosen).to(self.device)
            posterior, carried = posterior.rows(rows), carried[rows]
        return Query(
            self.network.conditioned(prior, posterior, conditioning),
            target,
            change,
            torch.full_like(target, REFERENCE_SAMPLE),
            carried,
        )

    def _ways(self, technical: np.ndarray) -> Tensor:
        """(N,) NEW_STUDY where training hid studies and the encoded technical metadata (N, D) tell none; else PREDICTED."""
        columns = [
            field.name == self.hidden_study
            for field in self.metadata.groups["technical"]
            for _ in range(field.size)
        ]
        unknown = ~technical[:, np.array(columns, dtype=bool)].any(axis=1) & any(columns)
        return torch.from_numpy(np.where(unknown, UNSEEN_STUDY, PRIOR)).to(self.device)

    def calibrated(self, expression: np.ndarray, labels: np.ndarray) -> "TrainedGEM":
        """The same with the temperatures of its heads fitted to labels (N, heads) of log-CPM (N, G); 1 where there are no samples."""
        logits = self.logits(self.posterior(expression).mean) if len(expression) else {}
        fitted = {
            name: fit_temperature(logits[name], labels[:, position])
            for position, name in enumerate(logits)
        }
        return replace(self, temperatures=dict.fromkeys(self.temperatures, 1.0) | fitted)

    @torch.no_grad()
    def logits(self, latents: Tensor) -> dict[str, np.ndarray]:
        """(N, K) per label head, of latents (N, L)."""
        return {
            name: logits.cpu().numpy() for name, logits in self.network.classify(latents).items()
        }

    def probabilities(self, latents: Tensor) -> dict[str, np.ndarray]:
        """(N, K) calibrated probabilities per label head, of latents (N, L)."""
        return {
            name: probabilities(logits, self.temperatures[name])
            for name, logits in self.logits(latents).items()
        }

    @torch.no_grad()
    def expect(self, query: Query, draws: int, seed: int) -> np.ndarray:
        """(N, G) log-CPM averaged over `draws` of the latents: the mean prediction."""
        generator = torch.Generator(self.device).manual_seed(seed)
        result = np.empty((len(query.target), len(self.genes)), dtype=np.float32)
        for rows in _blocks(len(query.target)):
            part = query.rows(rows)
            total = sum(
                self.network.observation.log_cpm(
                    decode(self.network, part, sample_normal(*part.latents, generator))
                )
                for _ in range(draws)
            )
            result[rows] = (total / draws).cpu().numpy()
        return result


@torch.no_grad()
def predictive_log_likelihood(
    network: Network, observed: Observed, query: Query, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """((N,) nats, (N, G) mean of what is decoded): log mean_k p(x | z_k) over draws z_k of the prior.

    Draws z_k are those of the query's latents. The mean of the likelihoods, not of their logarithms: that would reward a prior without spread.
    """
    log_likelihoods, total = [], torch.zeros_like(observed.expression)
    for _ in range(draws):
        decoded = decode(network, query, sample_normal(*query.latents, generator))
        log_likelihoods.append(network.observation.log_likelihood(observed, decoded, PRIOR))
        total += decoded
    stacked = torch.stack(log_likelihoods)
    return stacked.logsumexp(dim=0) - torch.tensor(float(draws)).log(), total / draws


def distinct_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows (U, D) in lexicographic order, index (N,) of each row among them).

    By a hash of each row first, which is then checked: comparing whole rows, as numpy does, takes a hundred times as long.
    """
    if matrix.shape[1] == 0 or len(matrix) == 0:
        return matrix[:1], np.zeros(len(matrix), dtype=np.int64)
    bits = (
        np.ascontiguousarray(matrix + 0, dtype=np.float32).view(np.uint32).astype(np.uint64)
    )  # -0 becomes 0
    factors = np.random.default_rng(0).integers(
        1, 2**63, matrix.shape[1], dtype=np.uint64
    ) | np.uint64(1)
    _, first, inverse = np.unique(bits @ factors, return_index=True, return_inverse=True)
    rows, inverse = matrix[first], inverse.reshape(-1)
    if not np.array_equal(rows[inverse], matrix):
        rows, inverse = np.unique(matrix, axis=0, return_inverse=True)
        return rows, inverse.reshape(-1)
    varying = (rows != rows[:1]).any(axis=0)
    order = np.lexsort(rows[:, varying].T[::-1]) if varying.any() else np.zeros(1, dtype=np.int64)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[order], place[inverse]


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))
