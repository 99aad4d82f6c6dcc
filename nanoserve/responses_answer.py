"""The answer to POST /v1/responses: pieces to its events, or to one response object. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoserve.blocks import Block, Blocks, Step
from nanoserve.chat import ChatCall
from nanoserve.choice import Piece
from nanoserve.errors import EngineError
from nanoserve.metrics import RequestRecord
from nanoserve.protocol import error_answer
from nanoserve.responses import sealed
from nanoserve.sse import named_event

_OUTPUT = "response.output_item"


@dataclass(slots=True)
class ResponseWire:
    """An `answers.Wire`.

    Args:
        head: ``id``, ``created`` and ``model``.
        settings: what the request said, which the answer repeats; see `settings_of`.
    """

    head: Mapping[str, Any]
    settings: Mapping[str, Any]
    _blocks: Blocks = field(default_factory=Blocks)
    _status: str = "in_progress"
    _sent: int = 0
    ping = b": ping\n\n"

    def begin(self, record: RequestRecord) -> bytes:
        """The response without output, before the first token."""
        return self._lifecycle("created") + self._lifecycle("in_progress")

    def piece(self, piece: Piece, record: RequestRecord, last: bool) -> bytes:
        """The events of a piece's blocks."""
        return b"".join(
            self._event(kind, data) for step in self._steps(piece) for kind, data in self._events(step)
        )

    def end(self, record: RequestRecord) -> bytes:
        """The whole response."""
        return self._lifecycle(self._status, record)

    def failed(self, error: EngineError, record: RequestRecord) -> bytes:
        """The response as far as it has come, with the error."""
        self._status = "failed"
        told = {"code": "server_error", "message": error_answer(error)[1]["error"]["message"]}
        return self._event("response.failed", {"response": {**self._response(record), "error": told}})

    def whole(self, pieces: Sequence[Piece], record: RequestRecord) -> dict[str, Any]:
        """The response."""
        for piece in pieces:
            for _ in self._steps(piece):
                pass
        return self._response(record)

    def _steps(self, piece: Piece) -> list[Step]:
        steps = list(self._blocks.push(piece.parts))
        if piece.finish:
            self._status = "incomplete" if piece.finish == "length" else "completed"
            steps += self._blocks.finish()
        return steps

    def _event(self, kind: str, data: Mapping[str, Any]) -> bytes:
        self._sent += 1
        return named_event({"type": kind, "sequence_number": self._sent - 1, **data})

    def _lifecycle(self, kind: str, record: RequestRecord | None = None) -> bytes:
        return self._event(f"response.{kind}", {"response": self._response(record)})

    def _response(self, record: RequestRecord | None) -> dict[str, Any]:
        cut = self._status == "incomplete"
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "model": self.head["model"],
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [_item(block, self._state(block), block.text) for block in self._blocks.all],
            "usage": None if record is None else _usage(record),
            **self.settings,
        }

    def _state(self, block: Block) -> str:
        """The status of a block that has ended: the last of an answer that was cut off is cut off too."""
        cut = self._status in ("incomplete", "failed") and block is self._blocks.all[-1]
        return "incomplete" if cut else "completed"

    def _events(self, step: Step) -> list[tuple[str, dict[str, Any]]]:
        block, text = step.block, step.block.text
        item = {"item_id": _id(block), "output_index": block.index}
        part = {**item, "content_index": 0}
        match step.what, block.kind:
            case "begun", kind:
                added = {"output_index": block.index, "item": _item(block, "in_progress", None)}
                opened = [("response.content_part.added", {**part, "part": _part(block, "")})]
                return [(f"{_OUTPUT}.added", added), *(opened if kind != "call" else [])]
            case "more", "call":
                return [("response.function_call_arguments.delta", {**item, "delta": step.text})]
            case "more", "reasoning":
                return [("response.reasoning_text.delta", {**part, "delta": step.text})]
            case "more", "text":
                return [("response.output_text.delta", {**part, "delta": step.text, "logprobs": []})]
            case "ended", "call":
                told = {**item, "name": block.name, "arguments": text}
                closed = [("response.function_call_arguments.done", told)]
            case "ended", kind:
                more = {"logprobs": []} if kind == "text" else {}
                name = "output_text" if kind == "text" else "reasoning_text"
                closed = [
                    (f"response.{name}.done", {**part, "text": text, **more}),
                    ("response.content_part.done", {**part, "part": _part(block, text)}),
                ]
        done = {"output_index": block.index, "item": _item(block, self._state(block), text)}
        return [*closed, (f"{_OUTPUT}.done", done)]


def settings_of(body: Mapping[str, Any], call: ChatCall) -> dict[str, Any]:
    """What an answer repeats of the request, with the values that hold where it gave none."""
    effort = call.conversation.thinking.effort
    return {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": call.sampling.max_tokens,
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": call.conversation.tools.parallel,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": call.sampling.temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": call.sampling.top_p,
        "truncation": "disabled",
    }


def _id(block: Block) -> str:
    return {"reasoning": "rs_", "text": "msg_", "call": "fc_"}[block.kind] + block.id


def _item(block: Block, status: str, text: str | None) -> dict[str, Any]:
    """An item with its text; None is before it has begun."""
    content = [] if text is None else [_part(block, text)]
    match block.kind:
        case "reasoning":
            seal = None if text is None else sealed(text)
            own: dict[str, Any] = {
                "type": "reasoning",
                "summary": [],
                "content": content,
                "encrypted_content": seal,
            }
        case "text":
            own = {"type": "message", "role": "assistant", "content": content}
        case "call":
            call = {"call_id": f"call_{block.id}", "name": block.name, "arguments": text or ""}
            own = {"type": "function_call", **call}
    return {"id": _id(block), **own, "status": status}


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "input_tokens": record.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": record.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": record.reasoning_tokens},
        "total_tokens": record.prompt_tokens + record.completion_tokens,
    }
