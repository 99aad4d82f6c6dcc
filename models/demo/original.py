r"""The BF16 model that the shipped checkpoint was made of, back to the last bit.

    python -m nanoserve.models.demo.original OUT_DIR

Quantised weights and what their rounding lost are kept apart: the checkpoint has the first, ``training/lost.xz``
the second, and a digest in ``training/result.json`` says whether both together are what came out of the training.
"""

import argparse
import hashlib
import json
import lzma
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoserve.checkpoint import SINGLE
from nanoserve.errors import CheckpointError, ConfigError, NanoserveError
from nanoserve.files import DEMO_MODEL
from nanoserve.kernels import fp8, nvfp4
from nanoserve.models.demo import released
from nanoserve.models.demo.export import copy_files

_TRAINING = Path(__file__).parent / "training"
LOST = _TRAINING / "lost.xz"
"""For each quantised weight by name, its BF16 bits ^ those of its quantised value: low bytes, then high ones."""

_SCALES = ("_scale", "_scale_2")


def restore(out: Path, shipped: Path = DEMO_MODEL, lost: Path = LOST) -> str:
    """Write the BF16 checkpoint.

    Args:
        out: a new or empty directory.
        shipped: the quantised checkpoint.
        lost: what `keep` wrote.

    Returns:
        The SHA-256 of its model.safetensors, in hexadecimal.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: name a new directory")
    stored = load_file(shipped / SINGLE)
    names = _quantised(stored)
    tensors = {name: stored[name] for name in stored if not name.endswith(_SCALES) and name not in names}
    low, high = np.split(np.frombuffer(lzma.decompress(lost.read_bytes()), dtype=np.uint8).astype(np.uint16), 2)
    bits, at = torch.from_numpy((low | high << 8).view(np.int16)), 0
    for name in names:
        rounded = _rounded(stored, name)
        part = bits[at : at + rounded.numel()].view(rounded.shape)
        tensors[name] = (rounded ^ part).view(torch.bfloat16)
        at += rounded.numel()
    released.write_json(out / "config.json", released.CONFIG)
    copy_files(shipped, out)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    return hashlib.sha256((out / SINGLE).read_bytes()).hexdigest()


def keep(original: Path, shipped: Path, lost: Path) -> None:
    """Write what the quantisation lost, after a new training and export."""
    stored, source = load_file(shipped / SINGLE), load_file(original / SINGLE)
    parts = [(source[name].view(torch.int16) ^ _rounded(stored, name)).flatten() for name in _quantised(stored)]
    bits = torch.cat(parts).numpy().view(np.uint16)
    planes = np.concatenate(((bits & 255).astype(np.uint8), (bits >> 8).astype(np.uint8)))
    lost.write_bytes(lzma.compress(planes.tobytes(), preset=6))


def _quantised(stored: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in stored if f"{name}_scale" in stored)


def _rounded(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """The quantised value nearest in BF16, as int16 bits."""
    return expanded(stored, name).bfloat16().view(torch.int16)


def expanded(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of an exported checkpoint as its format's exact value, in float32."""
    data, scale = stored[name], stored.get(f"{name}_scale")
    if scale is None:
        return data.float()
    if data.dtype == torch.uint8:
        return nvfp4.unpack(data, scale, stored[f"{name}_scale_2"])
    return fp8.widen(data) * scale


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m nanoserve.models.demo.original", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    try:
        out: Path = parser.parse_args().out
        digest, wanted = restore(out), json.loads((_TRAINING / "result.json").read_text("utf-8"))["sha256"]
        if digest != wanted:
            raise CheckpointError(SINGLE, f"has the SHA-256 {digest} and the trained model {wanted}")
    except NanoserveError as error:
        print(f"original: error: {error}", file=sys.stderr)
        return 1
    print(f"{out / SINGLE}: SHA-256 {digest}, as trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
