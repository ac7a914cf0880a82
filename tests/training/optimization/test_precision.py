"""When a fit multiplies in bf16."""

import pytest
import torch

from pipeline.gem.training.optimization.precision import has_bf16, uses_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16"])
def test_auto_takes_bf16_for_a_wide_network_on_hardware_that_has_it(
    params, monkeypatch, capability
):
    wide, narrow = (params.model.model_copy(update={"hidden": hidden}) for hidden in (256, 128))
    train = params.train.model_copy(update={"precision": "auto"})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, capability: False})
    assert not has_bf16(CPU) and not uses_bf16(train, wide, CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert uses_bf16(train, wide, CPU) and not uses_bf16(train, narrow, CPU)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_declared_precision_holds_on_any_hardware(params, precision):
    train = params.train.model_copy(update={"precision": precision})
    assert uses_bf16(train, params.model, CPU) == (precision == "bf16")
