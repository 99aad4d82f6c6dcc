"""Small files of a checkpoint: opened only if they are regular files, read whole, faults named by file."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from nanoserve.errors import CheckpointError

AGAIN = "download the file again"
DEMO_MODEL = Path(__file__).parent / "models" / "demo" / "nanoserve-demo"
"""The small model in the box, which serves where no MODEL is given."""

SHAPES_FOLDER = Path(__file__).parent / "shapes"
"""The released geometries, and what other engines took for them."""

JSON_LIMIT = 100_000_000
"""Bytes of a JSON file or header at most: the safetensors library's own limit."""


def read_object(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object; a bare Infinity passes, for real configs hold one.

    Raises:
        CheckpointError: the file is missing, or is no JSON object.
    """
    data = _read(directory, name)
    try:
        value: object = json.loads(data.decode("utf-8-sig"))  # real time_step_limits hold a bare Infinity
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, f"is not JSON ({shown(str(error))}): {AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(name, f"holds a {type(value).__name__} and must hold a JSON object")
    return cast("dict[str, Any]", value)


def read_optional(directory: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file.

    Raises:
        CheckpointError: as `read_object`.
    """
    # A dangling link is there, and an error: half a download is not a model without the file.
    return read_object(directory, name) if os.path.lexists(directory / name) else None


def read_text(directory: Path, name: str) -> str:
    """A file of UTF-8 text.

    Raises:
        CheckpointError: it is missing, too large or no text.
    """
    try:
        return _read(directory, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(name, f"is not UTF-8 text ({error.reason}): {AGAIN}") from error


def _read(directory: Path, name: str) -> bytes:
    try:
        with open_regular(directory, name) as file:
            data = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise unreadable(name, error) from error
    if len(data) > JSON_LIMIT:
        raise CheckpointError(name, f"is larger than {JSON_LIMIT} bytes, which no checkpoint needs")
    return data


def open_regular(directory: Path, name: str) -> BinaryIO:
    """A regular file, opened; a pipe or device in its place would block for ever."""
    try:
        if stat.S_ISREG((directory / name).stat().st_mode):
            return open(directory / name, "rb")
    except FileNotFoundError as error:
        raise CheckpointError(name, f"is missing from {shown(str(directory))}; download it") from error
    except OSError as error:
        raise unreadable(name, error) from error
    raise CheckpointError(name, "is not a regular file")


def unreadable(name: str, error: OSError) -> CheckpointError:
    """What to raise for a file that the system will not read."""
    return CheckpointError(shown(name), f"cannot be read: {error.strerror}")


def shown(text: str) -> str:
    """The text on one short line, whatever is in it."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else text[:197] + "…"
