"""A trained GEM: the network with everything that prediction needs.

N samples, R references, G genes, L latents. Expression is log-CPM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Model
from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.common.files import sha256_of, write_atomically
from pipeline.gem.data.encoder import EncodedGroup, MetadataEncoder, joined_rows
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.model import model_file
from pipeline.gem.model.calibration import fit_temperature, probabilities
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.network import Gaussian, Network
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.query import DecoderInput, MixedQuery, TargetGenes
from pipeline.gem.model.training_support import TrainingSupport

DEFAULT_CONDITIONING = ("technical", "biological")  # groups taken from a reference
_ROWS = 4096  # encoded at a time


@dataclass(frozen=True)
class TrainedGEM:
    """Encodes samples, and prepares the decoding of queries from metadata or reference samples."""

    network: Network
    metadata: MetadataEncoder
    genes: np.ndarray  # (G,) gene ids, in the order of every expression matrix
    targets: TargetGenes
    params: Model
    hidden_study: str | None  # the study covariate, if training masked it for UNSEEN_STUDY
    training_support: TrainingSupport
    label_form: LabelForm  # of the cells of a query
    refit: bool  # with the validation samples, after the fit on the training split
    temperatures: Mapping[str, float] = field(default_factory=dict)  # by label head
    mixed: MixedModel | None = None  # averaged with the network's prediction from metadata
    network_weight: float = 1.0  # in that average

    @classmethod
    def build(
        cls,
        genes: np.ndarray,
        metadata: MetadataEncoder,
        targets: TargetGenes,
        params: Model,
        hidden_study: str | None = None,
        training_support: TrainingSupport = TrainingSupport(),  # noqa: B008 (frozen)
        label_form: LabelForm = LabelForm(),  # noqa: B008 (frozen)
        refit: bool = False,
    ) -> "TrainedGEM":
        """An untrained GEM. Weights are drawn from torch's global random state."""
        heads = {
            field.name: (metadata.group_of(field.name), len(field.levels))
            for field in metadata.heads()
        }
        perturbation = metadata.columns("perturbation")
        intervention_columns = [False] * (perturbation[-1].features.stop if perturbation else 0)
        for part in perturbation:
            if part.field.name != targets.column and part.field.features is None:
                intervention_columns[part.own] = [True] * part.field.first_features
        network = Network(len(genes), metadata.groups, heads, intervention_columns, params)
        learned = genes, targets, params, hidden_study, training_support, label_form, refit
        return cls(network, metadata, *learned, dict.fromkeys(heads, 1.0))

    def to_bytes(self) -> bytes:
        """The content of model.safetensors; the same for the same model."""
        genes = tuple(str(gene) for gene in self.genes)
        description = model_file.ModelDescription(
            genes=genes,
            gene_list_sha256=sha256_of(genes),
            metadata=model_file.MetadataState.from_encoder(self.metadata),
            targets=self.targets,
            model=self.params,
            hidden_study=self.hidden_study,
            training_support=self.training_support,
            label_form=self.label_form,
            refit=self.refit,
            temperatures=dict(self.temperatures),
            mixed=model_file.MixedState.of(self.mixed, self.network_weight) if self.mixed else None,
        )
        tensors = model_file.named_tensors(self.network.state_dict(), self.metadata, self.mixed)
        return model_file.pack(description, tensors)

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> "TrainedGEM":
        """From a model directory or a model file. InputError if the file is absent, IntegrityError
        if it is damaged or no model file."""
        path = Path(path)
        path = path / model_file.MODEL_FILE if path.is_dir() else path
        description, tensors = model_file.unpack(path)
        arguments = (
            np.array(description.genes, dtype=object),
            description.metadata.to_encoder(tensors),
            description.targets,
            description.model,
            description.hidden_study,
            description.training_support,
            description.label_form,
            description.refit,
        )
        with torch.random.fork_rng(devices=[]):
            # First on the meta device: a file may declare a network larger than memory.
            try:
                with torch.device("meta"):
                    expected = cls.build(*arguments)
            except (RuntimeError, OverflowError) as error:
                problem = f"weights do not fit the configuration: {error}"
                raise model_file.refusal(path, problem) from None
            weights = model_file.network_weights(path, tensors, expected.network.state_dict())
            if description.temperatures.keys() != expected.temperatures.keys():
                raise model_file.refusal(path, "temperatures are not those of its label heads")
            gem = replace(cls.build(*arguments), temperatures=description.temperatures)
        if state := description.mixed:
            mixed = state.to_model(tensors)
            gem = replace(gem, mixed=mixed, network_weight=state.network_weight)
        gem.network.load_state_dict(weights)
        gem.network.eval()
        return gem

    @classmethod
    def load_seeds(cls, directory: Path | str) -> tuple[list["TrainedGEM"], list[int]]:
        """(models of a model directory, their training seeds), model.safetensors first.
        IntegrityError if their genes or covariates differ."""
        listing = Path(directory) / "seeds" / "seeds.json"
        models = [cls.load(directory)]
        first, *others = model_file.read_seeds(listing)
        for seed in others:
            path = listing.parent / f"{seed}.safetensors"
            models.append(cls.load(path))
            models[-1].require_genes(models[0].genes, f"{path}: ")
            models[-1].require_vocabulary(models[0].metadata, f"{path}: ")
        return models, [first, *others]

    def require_genes(self, genes: np.ndarray, prefix: str = "") -> None:
        """IntegrityError with the difference if `genes` are not this model's, in its order."""
        if np.array_equal(self.genes, genes):
            return
        missing = sorted(set(self.genes) - set(genes))
        unknown = sorted(set(genes) - set(self.genes))
        order = "" if missing or unknown else ", in another order"
        raise IntegrityError(
            f"{prefix}the model has {len(self.genes)} genes, the data {len(genes)}: "
            f"{len(missing)} missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}{order}; "
            "train on this cohort"
        )

    def require_vocabulary(self, metadata: MetadataEncoder, prefix: str = "") -> None:
        """IntegrityError with the differences if `metadata` encodes covariates differently."""
        if differences := self.metadata.differences(metadata):
            raise IntegrityError(*(f"{prefix}{text}; train on this cohort" for text in differences))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.no_grad()
    def posterior(self, expression: np.ndarray) -> Gaussian:
        """q(z | x) for log-CPM (N, G)."""
        blocks = torch.from_numpy(expression).split(_ROWS)
        parts = [self.network.posterior(block.to(self.device)) for block in blocks]
        means, log_variances = zip(*parts, strict=True)
        return Gaussian(torch.cat(means), torch.cat(log_variances))

    @torch.no_grad()
    def decoder_input(
        self,
        samples: pd.DataFrame,
        reference: np.ndarray | None = None,
        conditioning: tuple[str, ...] = DEFAULT_CONDITIONING,
        unknown: str = "refuse",
        reference_index: np.ndarray | None = None,
    ) -> DecoderInput:
        """The decoder's input for metadata of N samples, with the groups in `conditioning` from
        reference expression (R, G).

        `reference_index` (N,) is the row of each sample's reference; by default R = N and each
        sample has its own. `unknown` as in MetadataEncoder.encode. InputError for an unknown group
        in `conditioning`.
        """
        unknown_groups = [group for group in conditioning if group not in GROUPS]
        if unknown_groups:
            known = ", ".join(GROUPS)
            raise InputError(f"conditioning: unknown groups {unknown_groups}; known: {known}")
        encoded = self.metadata.encode(samples, unknown)
        metadata, index = {}, {}
        for group, rows in encoded.items():
            metadata[group] = MetadataRows.from_sparse(rows.distinct, self.device)
            index[group] = torch.from_numpy(rows.index).to(self.device)
        prior = self.network.joint_prior(metadata, index)
        effect = self.network.target_effect(metadata["perturbation"])[index["perturbation"]]
        target_gene = torch.from_numpy(self.targets.positions(samples)).to(self.device)
        if reference is None or not conditioning:
            source = torch.from_numpy(self._sources(encoded["technical"])).to(self.device)
            metadata_index = torch.stack([index[group] for group in GROUPS], dim=1)
            mixed = self._mixed_query(encoded) if self.mixed else None
            return DecoderInput(prior, target_gene, effect, source, None, metadata_index, mixed)
        posterior, residual = self._encode_reference(reference)
        if reference_index is not None:
            rows = torch.from_numpy(reference_index).to(self.device)
            posterior, residual = posterior.rows(rows), residual[rows]
        latents = self.network.condition(prior, posterior, conditioning)
        source = torch.full_like(target_gene[:, 0], LatentSource.REFERENCE)
        return DecoderInput(latents, target_gene, effect, source, residual)

    def _mixed_query(self, encoded: Mapping[str, EncodedGroup]) -> MixedQuery:
        rows, index = joined_rows(encoded)
        metadata = self.mixed.rows(self.metadata, rows)
        of_samples = torch.from_numpy(index).to(self.device)
        return MixedQuery(self.mixed, self.network_weight, metadata, of_samples)

    def _encode_reference(self, reference: np.ndarray) -> tuple[Gaussian, Tensor]:
        """(q(z | reference), (R, G) residual to add to predictions) for log-CPM (R, G)."""
        posterior, expression = self.posterior(reference), torch.from_numpy(reference)
        residuals = [expression[:0].to(self.device)]
        for start in range(0, len(expression), _ROWS):
            rows = slice(start, start + _ROWS)
            block = expression[rows].to(self.device)
            decoded = self.network.decode(posterior.mean[rows])
            residuals.append(self.network.reference_residual(block, decoded))
        return posterior, torch.cat(residuals)

    def _sources(self, technical: EncodedGroup) -> np.ndarray:
        """(N,) UNSEEN_STUDY if training masked studies and the metadata name none, else PRIOR."""
        is_unseen = np.zeros(technical.distinct.shape[0], dtype=bool)
        for part in self.metadata.columns("technical"):
            if part.field.name == self.hidden_study:
                names = [technical.distinct[:, columns] for columns in (part.own, part.features)]
                is_unseen = sum(matrix.count_nonzero(axis=1) for matrix in names) == 0
        sources = np.where(is_unseen, LatentSource.UNSEEN_STUDY, LatentSource.PRIOR)
        return sources[technical.index]

    def with_temperatures(self, latents: Tensor, labels: np.ndarray) -> "TrainedGEM":
        """This model with the temperatures of its heads fitted to labels (N, heads), -1 missing, of
        samples with latents (N, L); 1 without samples."""
        logits = self.logits(latents) if len(latents) else {}
        fitted = {
            name: fit_temperature(logits[name], labels[:, position])
            for position, name in enumerate(logits)
        }
        return replace(self, temperatures=dict.fromkeys(self.temperatures, 1.0) | fitted)

    @torch.no_grad()
    def logits(self, latents: Tensor) -> dict[str, np.ndarray]:
        """(N, K) per label head, from latents (N, L)."""
        return {name: value.cpu().numpy() for name, value in self.network.classify(latents).items()}

    def probabilities(self, latents: Tensor) -> dict[str, np.ndarray]:
        """(N, K) calibrated probabilities per label head, from latents (N, L)."""
        return {
            name: probabilities(logits, self.temperatures[name])
            for name, logits in self.logits(latents).items()
        }
