"""Hostile and damaged models and checkpoints: one line, within seconds and a bound of memory."""

import json
import multiprocessing
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from pipeline.gem.common.errors import IntegrityError
from pipeline.gem.common.files import sha256_of
from pipeline.gem.model import tensor_file
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

SECONDS = 20.0  # of one core, for a file of any content; most take a fraction of one
# Bytes beyond those of the process: for the largest header, and for each byte of the file.
MEMORY, MEMORY_FACTOR = 2**29, 4
LIMIT = tensor_file.MAX_HEADER_BYTES - 2**16


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entries(number: int, entry: dict) -> bytes:
    return header(json.dumps({f"network.{place}": entry for place in range(number)}).encode())


def description(**changes: object) -> Callable[[Path], bytes]:
    """The model in a folder with changes of its description, and a correct checksum."""

    def content(model: Path) -> bytes:
        with safetensors.safe_open(model, "pt") as file:
            values = json.loads(file.metadata()["gem"])["content"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for key, change in changes.items():
            values[key] = change(values) if callable(change) else change
        return tensor_file.pack(json.dumps(values, separators=(",", ":")), tensors, "")

    return content


def with_model(**changes: object) -> Callable[[Path], bytes]:
    return description(model=lambda values: values["model"] | changes)


def tensor(shape: list[int], stop: int = 0) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}


def with_genes(genes: list[str]) -> Callable[[Path], bytes]:
    targets = {"column": None, "genes": {}}
    return description(genes=genes, gene_list_sha256=sha256_of(genes), targets=targets)


# Files of the largest size that is read, and files that declare far more than they hold.
HOSTILE: dict[str, bytes | Callable[[Path], bytes]] = {
    "header of 2**60 bytes": struct.pack("<Q", 2**60) + bytes(100),
    "nested header": header(b'{"a":' + b"[" * LIMIT),
    "tensors without values": entries(60_000, tensor([0])),
    "tensors of 2**80 values": entries(9, tensor([2**40, 2**40], 8)),
    "tensors of 0 times 2**62 values": entries(9, tensor([0, 2**62])),
    "offsets outside the file": entries(1, tensor([2**38], 2**40)),
    "genes": with_genes([f"{n:x}" for n in range(LIMIT // 12)]),
    "gene of 15 million letters": with_genes([*map(str, range(9999)), "x" * (LIMIT - 2**20)]),
    "empty combinations": description(
        training_support={"columns": [], "combinations": [[]] * (LIMIT // 4)}
    ),
    "temperatures": description(temperatures={f"{n:x}": 1.0 for n in range(LIMIT // 15)}),
    "network of 2**36 weights": with_model(hidden=2**16, expansion=1000),
    "interactions of 2**32 weights": with_model(interactions=2**16, hidden=2**16),
    "2,000 blocks": with_model(blocks=1000, prior_blocks=1000),
}


def load(path: Path, sender) -> None:
    """Sends (lines of the error, seconds of the processor, bytes of memory beyond the start)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
    start, before = time.process_time(), memory("VmRSS")
    try:
        TrainedGEM.load(path)
        problems = ("accepted",)
    except IntegrityError as error:
        problems = error.problems
    sender.send((problems, time.process_time() - start, memory("VmHWM") - before))


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def test_a_hostile_model_is_refused_within_seconds_and_memory(
    model_directory, tmp_path, record_property
):
    slowest = largest = 0.0
    for kind, content in HOSTILE.items():
        path = tmp_path / "model.safetensors"
        original = model_directory / "model.safetensors"
        path.write_bytes(content(original) if callable(content) else content)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=load, args=(path, sender))
        process.start()
        assert receiver.poll(30 * SECONDS), f"{kind}: no answer"
        problems, seconds, size = receiver.recv()
        process.join()
        for line in problems:
            assert line.startswith(f"{path}: ") and line.endswith("train the model again"), kind
            assert len(line) <= 300 and line.isprintable(), kind
        assert seconds < SECONDS, kind
        assert size <= MEMORY + MEMORY_FACTOR * path.stat().st_size, f"{kind}: {size:,} bytes"
        slowest, largest = max(slowest, seconds), max(largest, size / 2**20)
    figure = (
        f"{len(HOSTILE)} of {len(HOSTILE)} refused in {slowest:.1f} s, {largest:.0f} MB at most"
    )
    record_property("figure", figure)


def flipped(content: bytes, rng: np.random.Generator) -> tuple[bytes, int]:
    """(the content with one bit flipped, the position of the bit): half of them in the header."""
    changed, end = bytearray(content), len(content)
    if rng.random() < 0.5:
        end = 8 + struct.unpack("<Q", content[:8])[0]
    byte, bit = int(rng.integers(end)), int(rng.integers(8))
    changed[byte] ^= 1 << bit
    return bytes(changed), 8 * byte + bit


def test_no_flipped_bit_of_a_model_is_silent(
    model_directory, tmp_path, times, rng, record_property
):
    path, number = tmp_path / "model.safetensors", 10 * times
    content = (model_directory / path.name).read_bytes()
    for _ in range(number):
        changed, bit = flipped(content, rng)
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            pytest.fail(f"bit {bit}: {TrainedGEM.load(path)}")
    record_property("figure", f"{number} of {number} flipped bits refused")


@pytest.mark.parametrize("part", range(8))
def test_a_model_cut_anywhere_is_refused(model_directory, tmp_path, part):
    content = (model_directory / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[: part * len(content) // 8])
    with pytest.raises(IntegrityError):
        TrainedGEM.load(path)


def test_no_flipped_bit_of_a_checkpoint_is_silent(
    cohort, params, tmp_path, times, rng, caplog, record_property
):
    """The fit starts again with one warning."""
    data = TrainingData.load(cohort, torch.device("cpu"))
    checkpoint, number = Checkpoint.of(params, "data", 1, tmp_path), 10 * times
    fit(data, params.override({"train.epochs": 1}), 1, checkpoint=checkpoint)
    content = checkpoint.path.read_bytes()
    assert checkpoint.epochs() == 1
    for _ in range(number):
        changed, bit = flipped(content, rng)
        checkpoint.path.write_bytes(changed)
        caplog.clear()
        assert checkpoint.load() is None, f"bit {bit}"
        (record,) = caplog.records
        assert "the fit starts again" in record.getMessage()
    record_property("figure", f"{number} of {number} flipped bits found, the fit starts again")


STATES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "empty": Path.touch,
    "another fit": lambda path: Checkpoint(path.with_name("other.safetensors")).save([], {}),
}


@pytest.mark.parametrize("kind", STATES)
def test_no_other_file_is_a_checkpoint(tmp_path, kind, caplog):
    checkpoint = Checkpoint(tmp_path / "state.safetensors")
    STATES[kind](checkpoint.path)
    if kind == "another fit":
        (tmp_path / "other.safetensors").rename(checkpoint.path)
    assert checkpoint.load() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
