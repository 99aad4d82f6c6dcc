"""Results that are kept between runs: one JSON file each, in a folder of this user's cache."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/nanoserve``, or ``~/.cache/nanoserve``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "nanoserve"


@dataclass(frozen=True, slots=True)
class Cached:
    """Results by a digest of all that they depend on."""

    folder: Path

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of a key, made where there is none; a file that is no JSON is made anew.

        Args:
            key: hexadecimal.
            make: gives what JSON can hold.
        """
        path = self.folder / f"{key}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            value = make()
            write(path, json.dumps(value))
            return json.loads(json.dumps(value))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: others may read it, or write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
