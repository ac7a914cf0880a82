"""Decoding for predictions: equal to `Network.decode` but for rounding, in a third of the time.

Without residual blocks, the decoder network is W (g * LN(A x + a) + c) + b. LN subtracts the mean
over the H hidden units and divides by their standard deviation. With C, which is [A, a] minus its
mean over the hidden units, the two layers become one matrix M and a scale per sample:

    W (g * LN(A x + a) + c) + b = M [x, 1] / sd + W c + b,    M = W diag(g) C
    sd^2 = |C [x, 1]|^2 / H + eps = |R [x, 1]|^2 / H + eps,    C = Q R

Terms that are linear in the latents of one group are computed once for each distinct row of that
group's metadata: a query of 100,000 rows combines few studies, contexts and perturbations.

B samples, N rows of a query, G genes, L latents, D of them in the decoder network, H hidden units,
K nonlinear features, U distinct rows of a group's metadata, T rows of the table, P linear terms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gem.common.config import GROUPS
from pipeline.gem.model.network import Network
from pipeline.gem.model.query import DecoderInput, add_offsets

_MAX_TABLE_VALUES = 2**25  # 128 MiB
_MIN_REPEATS = 2  # rows of a query per row of the table: a table costs time, too


class FusedDecoder:
    """Decodes latents with the weights that the network has at construction."""

    @torch.no_grad()
    def __init__(self, network: Network):
        *hidden_layers, last = network.decoder
        first, *blocks, self.norm = hidden_layers
        self.hidden = nn.Sequential(*hidden_layers)
        self.network, self.bias = network, last.bias  # (G,)
        self.sizes = [network.sizes[group] for group in GROUPS]
        # A network that is narrower than its inputs is itself the smaller product.
        self.fused = not blocks and first.in_features + 1 < first.out_features
        none = last.weight.new_zeros(0, len(last.bias))
        self.mlp_weight, self.linear_weight, programs = none, none, none
        if self.fused:
            joint = torch.cat([first.weight, first.bias[:, None]], dim=1)
            centred = joint - joint.mean(dim=0)  # (H, D + 1)
            root = torch.linalg.qr(centred.double()).R.to(joint.dtype)
            self.deviation_weight = root.t() * len(centred) ** -0.5  # (D + 1, D + 1)
            self.mlp_weight = ((last.weight * self.norm.weight) @ centred).t()  # (D + 1, G)
            self.bias = last.bias + last.weight @ self.norm.bias
        if network.linear_decoder is not None:
            self.linear_weight = network.linear_decoder.weight.t()  # (L, G)
        if network.interaction is not None:
            programs = network.interaction.program.weight.t()
        self.nonlinear_weight = torch.cat([none if self.fused else last.weight.t(), programs])
        self.weight = torch.cat([self.mlp_weight, self.linear_weight, self.nonlinear_weight])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, G) decoded from latents (B, L), on the scale of the observation model."""
        features = [self._mlp_input(latents) * self.scale(latents)] if self.fused else []
        features += [latents] if len(self.linear_weight) else []
        features.append(self.nonlinear_features(latents))
        return torch.addmm(self.bias, torch.cat(features, dim=1), self.weight)

    def scale(self, latents: Tensor) -> Tensor:
        """(B, 1) reciprocal standard deviation of the hidden units."""
        squares = (self._mlp_input(latents) @ self.deviation_weight).square_()
        return torch.rsqrt(squares.sum(dim=1, keepdim=True) + self.norm.eps)

    def nonlinear_features(self, latents: Tensor) -> Tensor:
        """(B, K) hidden units unless they are fused, and strengths of the interaction programs."""
        network, features = self.network, [latents[:, :0]]
        if not self.fused:
            features.append(self.hidden(latents[:, network.mlp_start :]))
        if network.interaction is not None:
            _, biological, perturbation = latents.split(self.sizes, dim=1)
            features.append(network.interaction.strength(biological, perturbation))
        return torch.cat(features, dim=1)

    def _mlp_input(self, latents: Tensor) -> Tensor:
        """(B, D + 1) latents of the decoder network, and a constant."""
        return F.pad(latents[:, self.network.mlp_start :], (0, 1), value=1.0)


class MeanDecoder:
    """Decodes rows of one query at the mean of their latents.

    `table` (T, G) holds the linear terms of each distinct row of metadata. It is None if too few
    rows repeat, if it would be too large, without a linear decoder, and with a reference.
    """

    @torch.no_grad()
    def __init__(self, decoder: FusedDecoder, query: DecoderInput):
        self.decoder, self.network, self.query, self.table = decoder, decoder.network, query, None
        index = query.metadata_index
        if index is None or not len(decoder.linear_weight):
            return
        groups, sizes = range(len(GROUPS)), decoder.sizes
        terms = list(zip(groups, decoder.linear_weight.split(sizes), strict=True))
        if decoder.fused:
            first = int(self.network.mlp_start > 0)
            weights = decoder.mlp_weight[:-1].split(sizes[first:])
            terms += zip(groups[first:], weights, strict=True)
        latents = query.latents.mean.split(sizes, dim=1)
        latents = [latents[group][_positions(index[:, group])] for group in groups]  # (U, L_g)
        lengths = torch.tensor([len(latents[group]) for group, _ in terms], device=index.device)
        rows = int(lengths.sum())
        if rows * _MIN_REPEATS > len(index) or rows * len(decoder.bias) > _MAX_TABLE_VALUES:
            return
        tables = [latents[group] @ weight for group, weight in terms]
        # Each sample adds one row of every term, so the rows of one term can hold the constants.
        tables[0] += decoder.bias
        if decoder.fused:
            tables[len(groups)] += decoder.mlp_weight[-1]
        self.table = torch.cat(tables)
        # (N, P) row in the table of each term: linear terms, then those of the MLP.
        self.position = index[:, [group for group, _ in terms]] + lengths.cumsum(0) - lengths

    @torch.no_grad()
    def decode(self, rows: Tensor) -> Tensor:
        """(B, G) decoded for the rows (B,) of the query, with their offsets."""
        decoder, latents = self.decoder, self.query.latents.mean.index_select(0, rows)
        if self.table is None:
            return add_offsets(decoder.decode(latents), self.query, rows)
        position = self.position.index_select(0, rows)
        scales = latents.new_ones(position.shape)
        if decoder.fused:
            scales[:, len(GROUPS) :] = decoder.scale(latents)
        decoded = F.embedding_bag(position, self.table, mode="sum", per_sample_weights=scales)
        decoded.addmm_(decoder.nonlinear_features(latents), decoder.nonlinear_weight)
        return add_offsets(decoded, self.query, rows)


def _positions(index: Tensor) -> Tensor:
    """(U,) a position of each of the values 0 to U - 1 in `index` (N,)."""
    positions = index.new_empty(int(index.max()) + 1)
    positions[index] = torch.arange(len(index), device=index.device)
    return positions
