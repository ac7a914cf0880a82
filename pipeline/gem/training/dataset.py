"""What a fit sees of a cohort: samples ready for the network, loaded and encoded once.

N samples, G genes. Expression is log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import Data, Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.references import reference_lists
from pipeline.gem.data.splits import SELECTION_SPLITS, TRAIN, contexts, is_control
from pipeline.gem.model.gem import TargetGenes, distinct_rows
from pipeline.gem.model.observation import Observed
from pipeline.gem.model.training_support import TrainingSupport

_TECHNICAL_LATENTS = (64, 512)  # fewest and most, where params.yaml leaves their number open


@dataclass(frozen=True)
class EncodedSplit:
    """Samples ready for the network: log-CPM (N, G), distinct metadata rows per group, labels (N, heads), target genes and total counts (N,)."""

    observed: Observed
    metadata: dict[str, Tensor]
    index: dict[str, Tensor]
    labels: Tensor
    target: Tensor
    totals: Tensor

    @property
    def expression(self) -> Tensor:
        return self.observed.expression

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        split: str,
        encoder: MetadataEncoder,
        device: torch.device,
        counted: bool = False,
    ) -> "EncodedSplit":
        """`counted`: with the counts themselves, which observation models of counts need."""
        samples, counts = cohort.rows([split]), cohort.counts([split])
        expression = torch.from_numpy(log_cpm(counts, samples["total"].to_numpy())).to(device)
        observed = Observed(
            expression, torch.from_numpy(counts.astype(np.int32)).to(device) if counted else None
        )
        metadata, index = {}, {}
        for group, matrix in encoder.encode(samples, unknown="missing").items():
            rows, inverse = distinct_rows(matrix)
            metadata[group], index[group] = (
                torch.from_numpy(rows).to(device),
                torch.from_numpy(inverse).to(device),
            )
        labels = list(encoder.labels(samples).values())
        stacked = (
            np.stack(labels, axis=1) if labels else np.zeros((len(samples), 0), dtype=np.int64)
        )
        target = torch.from_numpy(TargetGenes.of(cohort)(samples)).to(device)
        totals = torch.from_numpy(samples["total"].to_numpy()).to(device)
        return cls(observed, metadata, index, torch.from_numpy(stacked).to(device), target, totals)


@dataclass(frozen=True)
class TrainingData:
    """What a fit sees of a cohort; loaded and encoded once, shared by every fit of a process."""

    encoder: MetadataEncoder
    genes: np.ndarray
    targets: TargetGenes
    train: EncodedSplit
    references: "References"
    study_spread: Tensor  # (G,) log-CPM: how much studies differ from each other in their controls of a context
    study_column: str | None
    validation: EncodedSplit | None
    selection_split: str | None  # where early stopping and every choice look
    seen: TrainingSupport

    @classmethod
    def load(cls, cohort: Cohort, device: torch.device, counted: bool = False) -> "TrainingData":
        """`counted` as in Encoded.of."""
        samples = cohort.rows([TRAIN])
        encoder = MetadataEncoder.fit(samples, cohort.declared.covariates, cohort.features)
        train = EncodedSplit.of(cohort, TRAIN, encoder, device, counted)
        choice = next((split for split in SELECTION_SPLITS if cohort.has(split)), None)
        validation = EncodedSplit.of(cohort, choice, encoder, device, counted) if choice else None
        targets = TargetGenes.of(cohort)
        spread = torch.from_numpy(
            study_spread(samples, train.expression.cpu().numpy(), cohort.declared)
        ).to(device)
        references, seen = (
            References.of(samples, cohort, device),
            TrainingSupport.of(samples, cohort.declared),
        )
        return cls(
            encoder,
            cohort.genes,
            targets,
            train,
            references,
            spread,
            cohort.declared.study_column,
            validation,
            choice,
            seen,
        )

    def resolve_latent_sizes(self, params: Params) -> Params:
        """`params` with the number of technical latents, where they leave it open: as many as the technical covariates have columns.

        The effect of a study on the genes is dense and its own: fewer dimensions than studies cannot hold them all.
        """
        if params.model.latent.technical is not None:
            return params
        fewest, most = _TECHNICAL_LATENTS
        return params.override(
            {"model.latent.technical": min(max(self.encoder.sizes["technical"], fewest), most)}
        )


def study_spread(samples: pd.DataFrame, expression: np.ndarray, data: Data) -> np.ndarray:
    """(G,) float32 standard deviation between studies, within a context, of the means of their controls (N, G); log-CPM.

    All samples stand for controls where there are none. Zero where no context has two studies.
    """
    control = is_control(samples, data).to_numpy()
    rows = samples[control] if control.any() else samples
    if data.study_column is None:
        return np.zeros(expression.shape[1], dtype=np.float32)
    keys = pd.MultiIndex.from_arrays(
        [contexts(rows, data), label_texts(rows[data.study_column]).fillna("?")],
        names=["context", "study"],
    )
    means = (
        pd.DataFrame(expression[control] if control.any() else expression, index=keys)
        .groupby(level=["context", "study"])
        .mean()
    )
    within = means - means.groupby(level="context").transform("mean")
    freedom = len(means) - means.index.get_level_values("context").nunique()
    if freedom < 1:
        return np.zeros(expression.shape[1], dtype=np.float32)
    return np.sqrt((within**2).sum(axis=0).to_numpy() / freedom).astype(np.float32)


@dataclass(frozen=True)
class References:
    """For each training sample its best matching controls: `rows[start[i] : start[i] + number[i]]`."""

    rows: Tensor
    start: Tensor
    number: Tensor

    @classmethod
    def of(cls, samples: pd.DataFrame, cohort: Cohort, device: torch.device) -> "References":
        """Never the sample itself, but where it has no other control."""
        others = reference_lists(samples, samples, cohort.declared, same=True)
        lists = [found if len(found) else np.array([row]) for row, found in enumerate(others)]
        number = np.array([len(rows) for rows in lists])
        start = np.concatenate([[0], np.cumsum(number)[:-1]])
        return cls(
            *(
                torch.from_numpy(array).to(device)
                for array in (np.concatenate(lists), start, number)
            )
        )

    def draw(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) a reference row for each of the sample rows (B,)."""
        share = torch.rand(len(samples), generator=generator, device=samples.device)
        number = self.number[samples]
        return self.rows[self.start[samples] + torch.minimum((share * number).long(), number - 1)]
