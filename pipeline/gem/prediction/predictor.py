"""Prediction: counts for queries, block by block, from metadata or from references; and what a sample is.

N rows, U distinct rows, G genes, L latents, R references. One block is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import InputError, did_you_mean
from pipeline.gem.data.expression import CPM, round_to_totals
from pipeline.gem.model.gem import CONDITIONING, Query, TrainedGEM, decode
from pipeline.gem.model.normal import sample_normal
from pipeline.gem.prediction.fused_decoder import FoldedDecoder, Means
from pipeline.gem.prediction.query_table import REFERENCE, DistinctRows, known_columns
from pipeline.gem.prediction.reference_samples import ReferenceFile, ReferenceSamples

MODES = {
    "mean": "mean",
    "sample": "sample",
    "mean estimation": "mean",
    "sample generation": "sample",
}  # the public API's names too
BLOCK_VALUES = 2**22  # counts in memory at a time
QUERY_ROWS = 2**15  # encoded at a time
_CACHED_VALUES = 2**18  # decoded at a time: they stay in the cache,
_FEW_ROWS = 64  # unless that were fewer rows than this
_FLOAT32_TOTAL = 2**22  # above it, float32 leaves nothing for the remainders
_DRAWS, _EXTREME = (
    99,
    5,
)  # between the 5th lowest and the 5th highest of 99 draws another one falls with 90 %


@dataclass(frozen=True)
class Request:
    """How to predict; the names are those of the command line. InputError lists everything that is wrong."""

    mode: str = "mean"  # mean: latents at their mean, no noise; sample: latents and noise drawn
    samples: int = 1  # per row of the query, in mode sample
    total_count: int = 1_000_000  # counts of a predicted sample
    seed: int = 0
    unknown: str = "refuse"  # values that training never saw: refuse, or missing
    conditioning: tuple[str, ...] = CONDITIONING  # groups taken from the reference
    deterministic_latents: bool = False  # mode sample: only the noise is drawn
    latents: bool = False  # add the means of the latents
    interval: bool = False  # mode mean: add where 90 % of samples would lie, per gene

    def __post_init__(self):
        problems = (
            []
            if self.mode in MODES
            else [f"mode: {self.mode!r} is unknown{did_you_mean(self.mode, MODES)}"]
        )
        mode = MODES.get(self.mode, self.mode)
        problems += [
            f"conditioning: {group!r} is no group{did_you_mean(group, GROUPS)}"
            for group in self.conditioning
            if group not in GROUPS
        ]
        problems += (
            []
            if self.unknown in ("refuse", "missing")
            else [f"unknown: {self.unknown!r}; expected refuse or missing"]
        )
        for name, lowest, highest in (
            ("samples", 1, 10**6),
            ("total_count", 1, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            if not lowest <= getattr(self, name) <= highest:
                problems.append(f"{name}: {getattr(self, name)}; expected {lowest} to {highest:,}")
        if mode == "mean" and self.samples > 1:
            problems.append(
                f"samples: {self.samples} in mode mean, which has one answer; ask for mode sample"
            )
        if mode == "sample" and self.interval:
            problems.append(
                "interval: describes the distribution that mode sample draws from; ask for mode mean"
            )
        if problems:
            raise InputError(*problems)
        object.__setattr__(self, "mode", mode)


@dataclass(frozen=True)
class Block:
    """What is predicted for some rows of a query."""

    row: np.ndarray  # (n,) row of the query
    sample: np.ndarray  # (n,) number of the sample of that row, from 1
    extrapolated: np.ndarray  # (n,) bool
    counts: np.ndarray  # (n, G) int32
    latents: dict[str, np.ndarray] = field(default_factory=dict)  # by group (n, L_g): means
    low: np.ndarray | None = None  # (n, G) int32
    high: np.ndarray | None = None


class Prediction:
    """A model, or several as one, asked for a request: call `blocks` with what is asked."""

    def __init__(
        self, models: list[TrainedGEM], request: Request, references: ReferenceSamples | None = None
    ):
        """Several models speak as one: the mean of their log-CPM, or draws from each in turn."""
        self.models, self.request, self.references = models, request, references
        self.decoders = [FoldedDecoder(model.network) for model in models]
        if len(models) > 1 and request.latents:
            raise InputError("latents: several models have no latents in common; ask for one model")
        self.generator = torch.Generator(models[0].device).manual_seed(request.seed)
        # Rows of a query at a time: many, so that priors are computed once; few where references carry a residual per gene.
        self.rows = (
            QUERY_ROWS if references is None else max(1, BLOCK_VALUES // len(models[0].genes))
        )

    @cached_property
    def columns(self) -> list[str]:
        """Those of a query that matter."""
        return known_columns(self.models[0]) + ([REFERENCE] if self.references is not None else [])

    @torch.no_grad()
    def blocks(self, asked: DistinctRows) -> Iterator[Block]:
        """The answer to a block of a query, in the order of its rows, as many at a time as fit in memory."""
        chosen = self._references(asked)
        queries = [self._query(model, asked, chosen) for model in self.models]
        means = [
            Means.of(decoder, query) for decoder, query in zip(self.decoders, queries, strict=True)
        ]
        extrapolated = self.models[0].seen.extrapolated(asked.samples)
        answered = max(1, BLOCK_VALUES // len(self.models[0].genes))
        wanted = len(asked.index) * self.request.samples
        for start in range(0, wanted, answered):
            row, number = np.divmod(
                np.arange(start, min(start + answered, wanted)), self.request.samples
            )
            index = asked.index[row]
            latents = self._latents(queries[0], index) if self.request.latents else {}
            said = (
                self._means(means, index)
                if self.request.mode == "mean"
                else (self._draws(queries, index), None, None)
            )
            yield Block(row, number + 1, extrapolated[index], said[0], latents, *said[1:])

    def _query(self, model: TrainedGEM, asked: DistinctRows, chosen: np.ndarray | None) -> Query:
        if chosen is None:
            return model.query(asked.samples, unknown=self.request.unknown)
        used, place = np.unique(chosen, return_inverse=True)
        return model.query(
            asked.samples,
            self.references.expression[used],
            self.request.conditioning,
            self.request.unknown,
            place.reshape(-1),
        )

    def _references(self, asked: DistinctRows) -> np.ndarray | None:
        """(U,) row of the reference of each distinct row of the query, which `check_query` has seen."""
        if self.references is None:
            return None
        if asked.reference is None:
            return np.zeros(len(asked.samples), dtype=np.int64)
        return pd.Index(self.references.names).get_indexer([str(name) for name in asked.reference])

    def _means(
        self, means: list[Means], index: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """((n, G) counts, their lower and upper ends) of the distinct rows `index` (n,), each decoded once."""
        used, place = np.unique(index, return_inverse=True)
        alone = len(used) == len(index)
        used = index if alone else used
        rows_of = torch.from_numpy(used).to(self.generator.device)
        counts = np.empty((len(used), len(self.models[0].genes)), dtype=np.int32)
        low, high = (np.empty_like(counts) if self.request.interval else None for _ in range(2))
        for rows in _slices(*counts.shape):
            chosen = rows_of[rows]
            shares = [
                model.network.observation.fractions(said(chosen))
                for model, said in zip(self.models, means, strict=True)
            ]
            counts[rows] = whole_counts(_together(shares), self.request.total_count)
            if self.request.interval:
                low[rows], high[rows] = self._interval([said.query.rows(chosen) for said in means])
        return tuple(
            part if part is None or alone else part[place.reshape(-1)]
            for part in (counts, low, high)
        )

    def _interval(self, queries: list[Query]) -> tuple[np.ndarray, np.ndarray]:
        draws = [
            self._draw(draw % len(queries), queries[draw % len(queries)]) for draw in range(_DRAWS)
        ]
        ordered = np.partition(np.stack(draws), (_EXTREME - 1, _DRAWS - _EXTREME), axis=0)
        return ordered[_EXTREME - 1], ordered[_DRAWS - _EXTREME]

    def _draws(self, queries: list[Query], index: np.ndarray) -> np.ndarray:
        """(n, G) counts, one draw for each distinct row in `index` (n,); of several models each is as likely."""
        counts = np.empty((len(index), len(self.models[0].genes)), dtype=np.int32)
        model = (
            torch.randint(
                len(queries), (len(index),), generator=self.generator, device=self.generator.device
            )
            .cpu()
            .numpy()
        )
        for number, query in enumerate(queries):
            mine = np.flatnonzero(model == number)
            for rows in _slices(len(mine), counts.shape[1]):
                part = query.rows(torch.from_numpy(index[mine[rows]]).to(self.generator.device))
                counts[mine[rows]] = self._draw(number, part)
        return counts

    def _draw(self, number: int, query: Query) -> np.ndarray:
        model = self.models[number]
        latents = (
            query.latents.mean
            if self.request.deterministic_latents
            else sample_normal(*query.latents, self.generator)
        )
        library = np.full(len(query.target), self.request.total_count)
        decoded = decode(self.decoders[number], query, latents)
        return model.network.observation.draw_counts(
            decoded, library, query.way, self.generator
        ).astype(np.int32)

    def _latents(self, query: Query, index: np.ndarray) -> dict[str, np.ndarray]:
        means = query.latents.mean.cpu().numpy()
        return {
            group: means[index, place] for group, place in self.models[0].network.slices().items()
        }


def whole_counts(shares: Tensor, total: int) -> np.ndarray:
    """(N, G) int32 from shares (N, G), which may be overwritten; rows sum exactly to `total`. InputError where a row has none."""
    values = shares.cpu().numpy()
    if not np.isfinite(values.sum(axis=1)).all():
        raise InputError(
            "the model says nothing finite of a row: what is asked is too far from what it was trained on"
        )
    if total > _FLOAT32_TOTAL:
        values = values.astype(np.float64)
        values /= values.sum(axis=1, keepdims=True)
    values *= total
    return round_to_totals(values, np.full(len(values), total), np.int32)


def _together(shares: list[Tensor]) -> Tensor:
    """What several models say as one: the mean of their log-CPM."""
    if len(shares) == 1:
        return shares[0]
    linear = (sum(torch.log1p(CPM * share) for share in shares) / len(shares)).expm1_()
    return linear.div_(linear.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class Reconstruction:
    """What samples are: decoded from their own latents, and named by the heads."""

    row: np.ndarray  # (n,) row of the reference
    counts: np.ndarray | None  # (n, G) int32; None where nobody wants them
    latents: dict[str, np.ndarray]  # by group (n, L_g): posterior means
    labels: dict[str, np.ndarray]  # by head (n,) the likeliest label
    probabilities: dict[str, np.ndarray]  # by head (n,) its calibrated probability


@torch.no_grad()
def reconstruct(
    gem: TrainedGEM, file: ReferenceFile, total_count: int | None
) -> Iterator[Reconstruction]:
    """The samples of a file, encoded and decoded, in blocks; without what a perturbation does to its own target gene, which
    only metadata tell. Nothing is decoded where `total_count` is None."""
    for row, expression in file.chunks():
        means = gem.posterior(expression).mean
        counts = None if total_count is None else _decoded_counts(gem, means, total_count)
        named = {
            name: (chances.argmax(axis=1), chances.max(axis=1))
            for name, chances in gem.probabilities(means).items()
        }
        levels = {
            vocabulary.name: np.array(vocabulary.levels, dtype=object)
            for vocabulary in gem.metadata.heads()
        }
        yield Reconstruction(
            row,
            counts,
            {group: means[:, place].cpu().numpy() for group, place in gem.network.slices().items()},
            {name: levels[name][best] for name, (best, _) in named.items()},
            {name: chance for name, (_, chance) in named.items()},
        )


def _decoded_counts(gem: TrainedGEM, latents: Tensor, total: int) -> np.ndarray:
    counts = np.empty((len(latents), len(gem.genes)), dtype=np.int32)
    for rows in _slices(*counts.shape):
        counts[rows] = whole_counts(
            gem.network.observation.fractions(gem.network.decode(latents[rows])), total
        )
    return counts


def _slices(rows: int, genes: int) -> Iterator[slice]:
    """Of as many rows as stay in the cache; products of few rows are slow."""
    step = max(_FEW_ROWS, _CACHED_VALUES // max(1, genes))
    return (slice(start, start + step) for start in range(0, rows, step))
