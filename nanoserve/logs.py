"""The server's log: a line a request, as text or as one JSON object; prompts are in neither."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from starlette.types import Scope

from nanoserve.metrics import RequestRecord

log = logging.getLogger("nanoserve.access")

_QUIET_PATHS = ("/health", "/metrics")
_FIELDS = "nanoserve_fields"


def log_to_stderr(*, as_json: bool) -> None:
    """Give our own loggers a handler; as text, only if the program has set up none itself."""
    # uvicorn warns once a malformed request, with no word on which: anyone could fill the log with it.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logger = logging.getLogger("nanoserve")
    if not as_json and logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level and logger, then a request's fields or else the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII; a traceback is in ``exception``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        line |= getattr(record, _FIELDS, None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_request(scope: Scope, record: RequestRecord, request_id: str) -> None:
    """Log one request that has ended; those that monitors send all the time only at level DEBUG."""
    fields = request_fields(scope, record, request_id)
    level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
    log.log(level, "%s", _text(fields), extra={_FIELDS: fields})


def request_fields(scope: Scope, record: RequestRecord, request_id: str) -> dict[str, Any]:
    """What is logged of a request; times are in ms, and only one that generated has counts and speeds."""
    fields: dict[str, Any] = {
        "id": request_id,
        "method": scope["method"],
        "path": scope["path"].encode("unicode_escape").decode("ascii")[:200],
        "status": record.status or 499,
        "ms": round(record.seconds() * 1e3, 1),
    }
    if record.finish is None:
        return fields
    fields |= {"prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens}
    if record.ttft is not None:
        fields["ttft_ms"] = round(record.ttft * 1e3, 1)
    if (speed := record.tokens_per_second()) is not None:
        fields["tok_s"] = round(speed, 1)
    return fields | {"finish": record.finish}


def _text(fields: dict[str, Any]) -> str:
    words = ["{method} {path} {status} {ms:.1f} ms".format(**fields)]
    if "finish" in fields:
        words.append("prompt_tokens={prompt_tokens} completion_tokens={completion_tokens}".format(**fields))
        if "ttft_ms" in fields:
            words.append("ttft={ttft_ms:.1f} ms".format(**fields))
        if "tok_s" in fields:
            words.append("{tok_s:.1f} tok/s".format(**fields))
        words.append(f"finish={fields['finish']}")
    return " ".join([*words, f"id={fields['id']}"])
