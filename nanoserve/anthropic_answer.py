"""The answer to POST /v1/messages: pieces to Anthropic's events, or to one message. Pure functions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoserve.blocks import Block, Blocks, Step
from nanoserve.choice import Piece
from nanoserve.errors import EngineError
from nanoserve.metrics import RequestRecord
from nanoserve.protocol import anthropic_error, error_answer
from nanoserve.sse import named_event

SIGNATURE = "nanoserve"
"""Nothing is signed; but some clients send thoughts back only if they have a signature."""

_UNSTOPPED = {"stop_reason": None, "stop_sequence": None}


@dataclass(slots=True)
class MessageWire:
    """An `answers.Wire`.

    Args:
        id: of the request.
        name: of the answer.
        model: the served model's name.
        max_tokens: that were asked for; an answer that is cut off earlier has met the context's end.
    """

    id: str
    name: str
    model: str
    max_tokens: int
    _blocks: Blocks = field(default_factory=Blocks)
    _last: Piece = field(default_factory=lambda: Piece(0))
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def begin(self, record: RequestRecord) -> bytes:
        """The message without content, before the first token."""
        return named_event({"type": "message_start", "message": self._message([], _UNSTOPPED, record)})

    def piece(self, piece: Piece, record: RequestRecord, last: bool) -> bytes:
        """The events of a piece's blocks."""
        return b"".join(named_event(event) for step in self._steps(piece) for event in _events(step))

    def end(self, record: RequestRecord) -> bytes:
        """Why it ended, and the counts."""
        delta = {"type": "message_delta", "delta": self._stop(record), "usage": _usage(record)}
        return named_event(delta) + named_event({"type": "message_stop"})

    def failed(self, error: EngineError, record: RequestRecord) -> bytes:
        """The error; no message_stop is behind it."""
        return named_event(anthropic_error(error_answer(error)[1], 500, self.id))

    def whole(self, pieces: Sequence[Piece], record: RequestRecord) -> dict[str, Any]:
        """The message."""
        for piece in pieces:
            for _ in self._steps(piece):
                pass
        content = [_block(block, block.text) for block in self._blocks.all]
        return self._message(content, self._stop(record), record)

    def _steps(self, piece: Piece) -> list[Step]:
        steps = list(self._blocks.push(piece.parts))
        if piece.finish:
            self._last = piece
            steps += self._blocks.finish()
        return steps

    def _message(self, content: list[Any], stop: Mapping[str, Any], record: RequestRecord) -> dict[str, Any]:
        return {
            "id": self.name,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **stop,
            "usage": _usage(record),
        }

    def _stop(self, record: RequestRecord) -> dict[str, Any]:
        sequence = self._last.stopped_by
        match self._last.finish:
            case "tool_calls":
                reason = "tool_use"
            case "length" if record.completion_tokens < self.max_tokens:
                reason = "model_context_window_exceeded"
            case "length":
                reason = "max_tokens"
            case _:
                reason = "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _events(step: Step) -> list[dict[str, Any]]:
    place = {"index": step.block.index}
    match step.what:
        case "begun":
            return [{"type": "content_block_start", **place, "content_block": _block(step.block, "")}]
        case "more":
            return [{"type": "content_block_delta", **place, "delta": _delta(step.block, step.text)}]
        case "ended":
            signature = {"type": "signature_delta", "signature": SIGNATURE}
            sign = {"type": "content_block_delta", **place, "delta": signature}
            stop = {"type": "content_block_stop", **place}
            return [sign, stop] if step.block.kind == "reasoning" else [stop]


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "text":
            return {"type": "text_delta", "text": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _block(block: Block, text: str) -> dict[str, Any]:
    """A block with its text, or as it begins, without."""
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE if text else ""}
        case "text":
            return {"type": "text", "text": text}
        case "call":
            input = json.loads(text) if text else {}
            return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": input}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "input_tokens": record.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": record.completion_tokens,
        "output_tokens_details": {"thinking_tokens": record.reasoning_tokens},
    }
