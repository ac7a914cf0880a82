"""AdamW of the training loop against that of torch, which looks at each weight by itself."""

import pytest
import torch
from torch import nn

from pipeline.gem.training.optimization.optimizer import AdamW, WeightGroup

BETAS = 0.8, 0.99


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (5, 3), (4,), (2, 4)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def groups(of: list[nn.Parameter]) -> list[WeightGroup]:
    matrix, vector, variances = of
    return [
        WeightGroup([matrix], decay=0.2),
        WeightGroup([vector], decay=0.0),
        WeightGroup([variances], decay=0.0, scale=10.0),
    ]


def set_gradients(of: list[nn.Parameter], seed: int) -> None:
    for weight, gradient in zip(of, weights(seed), strict=True):
        weight.grad = 3.0 * gradient.detach()


@pytest.mark.parametrize("clip", [1.0, 1e6], ids=["clipped", "free"])
def test_steps_are_those_of_torch_after_a_clipped_gradient(clip):
    own, reference = weights(), weights()
    optimizer = AdamW(groups(own), clip, BETAS)
    settings = [
        {"params": group.weights, "weight_decay": group.decay} for group in groups(reference)
    ]
    expected = torch.optim.AdamW(settings, betas=BETAS)
    for step, rate in enumerate((1e-2, 3e-2, 2e-2), 1):
        for of in (own, reference):
            set_gradients(of, step)
        for group, scale in zip(expected.param_groups, (1.0, 1.0, 10.0), strict=True):
            group["lr"] = scale * rate
        torch.nn.utils.clip_grad_norm_(reference, clip)
        optimizer.step(rate)
        expected.step()
    for weight, other in zip(own, reference, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


def test_a_weight_without_gradient_stays():
    own = weights()
    before = own[1].detach().clone()
    optimizer = AdamW(groups(own), 1.0, BETAS)
    set_gradients(own, 1)
    own[1].grad = None
    optimizer.step(1e-2)
    assert torch.equal(own[1], before)
    assert not torch.equal(own[0], weights()[0])


def test_a_restored_state_continues_with_equal_bits():
    own, other = weights(), weights()
    optimizers = [AdamW(groups(of), 1.0, BETAS) for of in (own, other)]
    set_gradients(own, 1)
    optimizers[0].step(1e-2)
    saved = {name: tensor.clone() for name, tensor in optimizers[0].state().items()}
    optimizers[1].load_state(saved)
    with torch.no_grad():
        for weight, done in zip(other, own, strict=True):
            weight.copy_(done)
    for of, optimizer in zip((own, other), optimizers, strict=True):
        set_gradients(of, 2)
        optimizer.step(1e-2)
    assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))


def test_the_state_of_other_weights_is_refused():
    optimizer, saved = (
        AdamW(groups(weights()), 1.0, BETAS),
        AdamW(groups(weights())[:2], 1.0, BETAS).state(),
    )
    with pytest.raises(RuntimeError, match="tensors of the optimizer, expected 9"):
        optimizer.load_state(saved)


def test_a_gradient_that_is_not_finite_reaches_the_weights():
    """So that the loss of the next step shows it."""
    own = weights()
    optimizer = AdamW(groups(own), 1.0, BETAS)
    set_gradients(own, 1)
    own[1].grad[0] = torch.nan
    optimizer.step(1e-2)
    assert own[0].isnan().all()
