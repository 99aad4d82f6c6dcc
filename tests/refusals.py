"""What tests of checkpoint files share: a refusal is one short line that names the file."""

from pathlib import Path

import pytest
from safetensors_writer import Spec

from nanoserve.checkpoint import Checkpoint, open_checkpoint
from nanoserve.errors import CheckpointError

TWO: dict[str, Spec] = {"a.weight": ("BF16", (2, 3)), "b.weight": ("F32", (4,))}


def refused(directory: Path | str, *, weights: bool = True) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory, weights=weights)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return caught.value


def refused_file(home: Path, content: bytes) -> CheckpointError:
    (home / "model.safetensors").write_bytes(content)
    error = refused(home)
    assert error.file == "model.safetensors"
    return error


def read(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    buffer = bytearray(info.nbytes)
    checkpoint.read_into(info, memoryview(buffer))
    return bytes(buffer)
