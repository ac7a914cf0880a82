"""AdamW with a clipped gradient: a few operations for all weights of a network."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_EPSILON = 1e-8


@dataclass(frozen=True)
class WeightGroup:
    """Weights with settings of their own."""

    weights: list[nn.Parameter]
    decay: float
    scale: float = 1.0  # learning rate, relative to that of the step


@dataclass(frozen=True)
class _State:
    """Of one group."""

    steps: Tensor  # () so far
    means: list[Tensor]  # of the gradient of each weight
    mean_squares: list[Tensor]

    @classmethod
    def zeros(cls, group: WeightGroup) -> "_State":
        means, squares = ([torch.zeros_like(w) for w in group.weights] for _ in range(2))
        return cls(torch.zeros((), device=means[0].device), means, squares)


class AdamW:
    """As torch.optim.AdamW after clip_grad_norm_, for weights of which each always or never has a
    gradient.

    Those two look at each weight in Python, which took a tenth of the step of a small network.
    """

    def __init__(self, groups: Iterable[WeightGroup], clip: float, betas: tuple[float, float]):
        """`clip`: the largest norm of the gradient. `betas`: decay of the means of the gradient and
        of its square."""
        self.groups, self.clip, self.betas = [g for g in groups if g.weights], clip, betas
        self._states = [_State.zeros(group) for group in self.groups]
        self._trained: list[tuple[list, ...]] | None = None  # set by the first step

    def zero_grad(self) -> None:
        for group in self.groups:
            for weight in group.weights:
                weight.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        if self._trained is None:
            self._trained = [self._with_gradient(number) for number in range(len(self.groups))]
        of_groups = [[weight.grad for weight in weights] for weights, *_ in self._trained]
        gradients = [gradient for of_group in of_groups for gradient in of_group]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        divisor = (norm / self.clip).clamp_min_(1.0)
        for group, state, columns, of_group in zip(
            self.groups, self._states, self._trained, of_groups, strict=True
        ):
            weights, means, mean_squares, steps = columns
            if not weights:
                continue
            state.steps.add_(1)
            torch._fused_adamw_(
                weights,
                of_group,
                means,
                mean_squares,
                [],
                steps,
                lr=group.scale * learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group.decay,
                eps=_EPSILON,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
            )

    def _with_gradient(self, number: int) -> tuple[list, ...]:
        """(weights, means, mean squares, steps) of the weights of a group that have a gradient."""
        group, state = self.groups[number], self._states[number]
        columns = zip(group.weights, state.means, state.mean_squares, strict=True)
        rows = [(*row, state.steps) for row in columns if row[0].grad is not None]
        return tuple([row[place] for row in rows] for place in range(4))

    def state(self) -> dict[str, Tensor]:
        """All that the next steps depend on, by name."""
        named = {}
        for number, state in enumerate(self._states):
            named[f"{number}.steps"] = state.steps
            for position, pair in enumerate(zip(state.means, state.mean_squares, strict=True)):
                named[f"{number}.{position}.mean"], named[f"{number}.{position}.square"] = pair
        return named

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """RuntimeError if `saved` is not the state of such weights."""
        own = self.state()
        if own.keys() != saved.keys():
            raise RuntimeError(f"{len(saved)} tensors of the optimizer, expected {len(own)}")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
