"""Which fits multiply in bf16."""

import torch

from pipeline.gem.common.config import Model, Train

_WIDE = 256  # hidden units; on a narrow network the conversions cost more than the products save


def uses_bf16(params: Train, model: Model, device: torch.device) -> bool:
    """Whether the networks of a fit on `device` multiply in bf16; likelihoods stay float32.

    `auto` takes it for a wide network where the hardware has such products (AVX512_BF16, AMX, or
    CUDA from compute capability 8.0 on). Elsewhere they are emulated, and slower than float32.
    """
    if params.precision != "auto":
        return params.precision == "bf16"
    return model.hidden >= _WIDE and has_bf16(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
