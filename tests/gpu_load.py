"""By hand, on a machine with a GPU and 20 GB of disk: how fast a checkpoint is loaded, beside what the disk gives.

    PYTHONPATH=.:tests python tests/gpu_load.py OUT [FOLDER]

Writes a checkpoint of Nano's geometry (19 GB of noise in the released formats), reads it with nothing but threads
that call pread, and loads it; each once with the system's cache of its files dropped, and once with it.
"""

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.shapes import prepare_shape, shape_checkpoint
from nanoserve.staging import BUFFERS, PIECE
from nanoserve.startup import examine
from nanoserve.weights import DTYPES, load

SHARDS = 4
NOISE = os.urandom(64 << 20)


def write(folder: Path) -> int:
    """A checkpoint in the shape's formats; returns its bytes."""
    shape = shape_checkpoint("nano")
    manifest = prepare_shape("nano", EngineConfig(max_context=4096)).manifest
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for item in manifest.items:
        for part in item.parts:
            own = part.shape
            tensors += [(name, part.dtype, own) for name in part.names]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(shape.config)))
    total, index = 0, dict[str, str]()
    for shard in range(SHARDS):
        mine = tensors[shard * len(tensors) // SHARDS : (shard + 1) * len(tensors) // SHARDS]
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, at = dict[str, Any](), 0
        for tensor, dtype, own in mine:
            size = torch.Size(own).numel() * DTYPES[dtype].itemsize
            header[tensor] = {"dtype": dtype, "shape": list(own), "data_offsets": [at, at + size]}
            index[tensor], at = name, at + size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor, dtype, _ in mine:
                begin, end = header[tensor]["data_offsets"]
                fill(file.write, dtype, end - begin)
            file.flush()
            os.fsync(file.fileno())
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def fill(put: Callable[[bytes], object], dtype: str, size: int) -> None:
    """Noise; ones for what are scales."""
    if dtype == "F32":
        put(struct.pack("<f", 1.0) * (size // 4))
    elif dtype == "F8_E4M3":
        put(b"\x38" * size)
    else:
        for start in range(0, size, len(NOISE)):
            put(NOISE[: min(len(NOISE), size - start)])


def forget(folder: Path) -> None:
    """Drop the files from the system's cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw(folder: Path) -> float:
    """Seconds that reading takes with as many threads and pieces as the loader has."""
    jobs = [
        (path, at) for path in sorted(folder.glob("*.safetensors")) for at in range(0, path.stat().st_size, PIECE)
    ]

    def read(job: tuple[Path, int]) -> None:
        with job[0].open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [bytearray(PIECE)], job[1])

    begin = time.perf_counter()
    with ThreadPoolExecutor(BUFFERS) as pool:
        list(pool.map(read, jobs))
    return time.perf_counter() - begin


def loaded(folder: Path, device: torch.device) -> float:
    """Seconds that a load takes."""
    begin = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    manifest = examine(checkpoint, EngineConfig(device=device.type)).manifest  # pyright: ignore[reportArgumentType]
    fields = load(checkpoint, manifest, device, lambda done, total: None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    del fields
    return time.perf_counter() - begin


def main() -> None:
    """All four."""
    out = Path(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "/tmp/load")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.zeros(1, device=device)
    begin = time.perf_counter()
    size = write(folder) / 1e9
    result: dict[str, Any] = {"gb": size, "write_s": time.perf_counter() - begin, "device": device.type}
    works: dict[str, Callable[[], float]] = {"raw": lambda: raw(folder), "load": lambda: loaded(folder, device)}
    for what, work in works.items():
        forget(folder)
        for state in ("cold", "cached"):
            seconds = work()
            result[f"{what}_{state}_s"], result[f"{what}_{state}_gb_s"] = seconds, size / seconds
            print(f"{what} {state}: {seconds:.1f} s, {size / seconds:.2f} GB/s", flush=True)
    (out / "load.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
