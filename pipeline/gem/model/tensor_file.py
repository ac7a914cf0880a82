"""Tensors and a JSON text in one safetensors file, with a checksum of both.

The format of models and of checkpoints. A damaged or hostile file is refused in one line; it runs
no code, and reading it takes at most a few times its own size of memory.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.gem.common.errors import InputError, IntegrityError
from pipeline.gem.common.machine_errors import error_number

MAX_HEADER_BYTES = 2**24  # names and shapes of the tensors, and the text
MAX_TENSORS = 2**16
# The only entry of the header's metadata: safetensors writes several in a random order.
_KEY = "gem"
_TYPES = (torch.float32, torch.uint8)


def pack(text: str, tensors: Mapping[str, Tensor], advice: str) -> bytes:
    """The content of a file; the same for the same arguments. InputError, with `advice`, if the
    header is larger than MAX_HEADER_BYTES."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {_KEY: _envelope(text, _checksum(text, tensors))})
    size = _header_bytes(content)
    if size > MAX_HEADER_BYTES:
        names = "the names of genes, levels and weights"
        raise InputError(f"{names} take {size:,} bytes, more than {MAX_HEADER_BYTES:,}; {advice}")
    return content


def unpack(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(text, tensors) of a file. ValueError in one line if it is damaged or none of this format;
    OSError if it cannot be opened."""
    require_regular(path)
    with open(path, "rb") as file:
        size = _header_bytes(file.read(8))
        if size > path.stat().st_size:
            raise ValueError("not in the format of this program, or cut short")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        if file.read(size).count(b"data_offsets") > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
    try:
        with safe_open(path, "pt") as file:
            envelope = (file.metadata() or {}).get(_KEY, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        if error_number(error) is not None:
            raise  # of the machine, such as a shortage of memory
        raise ValueError(f"not in the format of this program ({error})") from None
    if not envelope.startswith('{"sha256":"'):
        raise ValueError("not in the format of this program, or of another version of it")
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.float32")
    text = envelope[len(_envelope("", "0" * 64)) - 1 : -1]
    if envelope != _envelope(text, _checksum(text, tensors)):
        raise ValueError("damaged: its content does not match its checksum")
    return text, tensors


def require_regular(path: Path) -> None:
    """ValueError for a folder, a device, a pipe, a link without an end. FileNotFoundError."""
    if not path.is_file():
        if not path.is_symlink():
            path.stat()  # raises FileNotFoundError
        raise ValueError("not a regular file")


def refusal(path: Path, *problems: str, advice: str) -> IntegrityError:
    """The error for a file with these problems."""
    return IntegrityError(*(f"{path}: {problem[:150]}; {advice}" for problem in problems))


def _header_bytes(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _envelope(text: str, checksum: str) -> str:
    """The JSON in the header's metadata."""
    return f'{{"sha256":"{checksum}","content":{text}}}'


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the text, and of the names, types, shapes and values of the tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy())
    return digest.hexdigest()
