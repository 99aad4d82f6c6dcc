"""Server-sent events."""

from collections.abc import Mapping
from typing import Any

from nanoserve.http_guard import to_json


def event(data: Mapping[str, Any]) -> bytes:
    """An event without a name."""
    return b"data: " + to_json(data) + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """An event whose name is its data's ``type``."""
    return b"event: " + data["type"].encode("ascii") + b"\n" + event(data)
