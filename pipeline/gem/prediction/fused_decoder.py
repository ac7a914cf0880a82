"""A trained network's decoder for prediction: the numbers of `Network.decode` but for rounding, in a fraction of the time.

Without residual blocks nothing bends between its first layer and its last but the division by a standard deviation: the two
are one matrix, scaled per sample. What is linear in a group's latents is computed once for each of its distinct rows of
metadata, and looked up: a query of 100,000 rows combines few studies with some contexts and perturbations.

B samples, N rows of a query, G genes, L latents, D of them that enter the decoder network, H its width, T rows of the table,
P parts of a row, K columns of what is left to multiply.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.gem.model.gem import Query, complete
from pipeline.gem.model.network import Network

_TABLE_VALUES = 2**25  # at most, 128 MB
_REPEATED = 2  # rows of a query for one row of the table, at least


class FoldedDecoder:
    """Decodes latents with the weights that the network had when this was made."""

    @torch.no_grad()
    def __init__(self, network: Network):
        self.network = network
        first, *self.blocks, self.norm, last = network.decoder
        self.narrow = not self.blocks and first.in_features + 1 < last.in_features
        self.bias, none = last.bias, last.weight.new_zeros(0, len(last.bias))
        self.scaled, self.straight, programs = none, none, none
        if self.narrow:
            # Its mean over the width is taken off the first layer once, instead of off every sample.
            joint = torch.cat([first.weight, first.bias[:, None]], dim=1)  # (H, D + 1)
            centred = joint - joint.mean(dim=0)
            self.deviation = (
                torch.linalg.qr(centred.double()).R.float() * len(centred) ** -0.5
            )  # keeps lengths, in D + 1 dimensions
            self.scaled = (
                ((last.weight * self.norm.weight) @ centred).t().contiguous()
            )  # (D + 1, G)
            self.bias = last.bias + last.weight @ self.norm.bias
        if network.linear_decoder is not None:
            self.straight = network.linear_decoder.weight.t()  # (L, G)
        if network.interaction is not None:
            programs = network.interaction.program.weight.t()
        self.bent = torch.cat([none if self.narrow else last.weight.t(), programs])  # (K, G)
        self.weight = torch.cat([self.scaled, self.straight, self.bent])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, G) of latents (B, L), on the scale of the observation model."""
        parts = [self._entering(latents) * self.scale(latents)] if self.narrow else []
        parts += [latents] if len(self.straight) else []
        return torch.addmm(
            self.bias, torch.cat([*parts, self.columns(latents)], dim=1), self.weight
        )

    def scale(self, latents: Tensor) -> Tensor:
        """(B, 1) one over the standard deviation that the layer norm divides by."""
        return torch.rsqrt(
            (self._entering(latents) @ self.deviation.t()).square_().sum(dim=1, keepdim=True)
            + self.norm.eps
        )

    def columns(self, latents: Tensor) -> Tensor:
        """(B, K) what is not linear in one group's latents."""
        network, places = self.network, self.network.slices()
        parts = [latents[:, :0]]
        if not self.narrow:
            hidden = network.decoder[0](latents[:, network.mlp_start :])
            for block in self.blocks:
                hidden = block(hidden)
            parts.append(self.norm(hidden))
        if network.interaction is not None:
            parts.append(
                network.interaction.strength(
                    latents[:, places["biological"]], latents[:, places["perturbation"]]
                )
            )
        return torch.cat(parts, dim=1)

    def _entering(self, latents: Tensor) -> Tensor:
        """(B, D + 1) latents of the decoder network, and a constant."""
        return F.pad(latents[:, self.network.mlp_start :], (0, 1), value=1.0)


@dataclass(frozen=True)
class Means:
    """What a model says of the rows of a query at the mean of their latents."""

    decoder: FoldedDecoder
    query: Query
    table: Tensor | None = (
        None  # (T, G) what a distinct row of one group's metadata adds; None where too few repeat
    )
    place: Tensor | None = None  # (N, P) where in the table the parts of each row are
    plain: int = 0  # of the P parts are added as they are; the others are scaled by the layer norm

    @classmethod
    @torch.no_grad()
    def of(cls, decoder: FoldedDecoder, query: Query) -> "Means":
        if query.level is None or not len(decoder.straight):
            return cls(decoder, query)
        slices, offset = list(decoder.network.slices().values()), decoder.network.mlp_start
        parts = [(group, decoder.straight[place]) for group, place in enumerate(slices)]
        plain = len(parts)
        if decoder.narrow:
            parts += [
                (group, decoder.scaled[place.start - offset : place.stop - offset])
                for group, place in enumerate(slices)
                if place.start >= offset
            ]
        sizes = (query.level.amax(dim=0) + 1).tolist()
        rows = sum(sizes[group] for group, _ in parts)
        if rows * _REPEATED > len(query.level) or rows * len(decoder.bias) > _TABLE_VALUES:
            return cls(decoder, query)
        tables = [
            _distinct(query, group, sizes[group])[:, slices[group]] @ weight
            for group, weight in parts
        ]
        # Every row of a query takes one of each table's rows: constants are added there.
        tables[0] += decoder.bias
        if decoder.narrow:
            tables[plain] += decoder.scaled[-1]
        starts = torch.tensor(
            [0, *(len(table) for table in tables[:-1])], device=query.level.device
        ).cumsum(0)
        return cls(
            decoder,
            query,
            torch.cat(tables),
            query.level[:, [group for group, _ in parts]] + starts,
            plain,
        )

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """(B, G) decoded for the rows (B,) of the query."""
        latents = self.query.latents.mean.index_select(0, rows)
        if self.table is None:
            return complete(self.decoder.decode(latents), self.query, rows)
        place = self.place.index_select(0, rows)
        weights = latents.new_ones(place.shape)
        if self.decoder.narrow:
            weights[:, self.plain :] = self.decoder.scale(latents)
        decoded = F.embedding_bag(place, self.table, mode="sum", per_sample_weights=weights)
        if len(self.decoder.bent):
            decoded.addmm_(self.decoder.columns(latents), self.decoder.bent)
        return complete(decoded, self.query, rows)


def _distinct(query: Query, group: int, number: int) -> Tensor:
    """(U, L) mean latents of a row of the query for each of the `number` distinct rows of a group's metadata."""
    some = query.level.new_empty(number)
    some[query.level[:, group]] = torch.arange(len(query.level), device=query.level.device)
    return query.latents.mean[some]
