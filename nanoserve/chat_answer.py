"""The message that answers a chat: pieces to OpenAI's chunks, or to one object. Pure functions.

Reasoning has both of its names in use, ``reasoning_content`` and ``reasoning``. A call's first delta has its id
and name, and the others have pieces of its arguments. Logprobs have an entry for every generated token, those of
reasoning and of calls too, in the order of generation.
"""

import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoserve.chat import ChatCall
from nanoserve.choice import Piece
from nanoserve.logprobs import chat_logprob
from nanoserve.parsing import CallArguments, CallBegun, Content, Part, Reasoning
from nanoserve.tokenizer import Tokenizer


@dataclass(slots=True)
class ChatWriter:
    """Pieces to OpenAI's chunks, or to one answer.

    Args:
        head: ``id``, ``created`` and ``model``, the same in every chunk.
        tokenizer: for logprobs.
        call: the request.
    """

    head: Mapping[str, Any]
    tokenizer: Tokenizer
    call: ChatCall
    _begun: set[int] = field(default_factory=lambda: set[int]())

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece's chunks: the role before a choice's first, and its finish reason alone in the last."""
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(piece.index, {"role": "assistant", "content": ""})
        deltas, logprobs = list(map(_delta, piece.parts)), self._logprobs([piece])
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._chunk(piece.index, delta, logprobs=logprobs)
            logprobs = None
        if piece.finish:
            yield self._chunk(piece.index, {}, finish=piece.finish)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk, if it was asked for."""
        return {**self._top("chat.completion.chunk"), "choices": [], "usage": usage}

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one object, without its usage."""
        choices = [self._choice(i, [p for p in pieces if p.index == i]) for i in range(self.call.delivery.choices)]
        return {**self._top("chat.completion"), "choices": choices}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        wanted = self.call.sampling.logprobs is not None
        return {
            "index": index,
            "message": _message([part for piece in pieces for part in piece.parts]),
            "logprobs": (self._logprobs(pieces) or {"content": [], "refusal": None}) if wanted else None,
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        if self.call.sampling.logprobs is None:
            return None
        entries = [chat_logprob(self.tokenizer, piece.token) for piece in pieces if piece.token]
        return {"content": entries, "refusal": None} if entries else None

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: object = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        last = {"usage": None} if self.call.delivery.include_usage else {}
        return {**self._top("chat.completion.chunk"), "choices": [choice], **last}

    def _top(self, kind: str) -> dict[str, Any]:
        return {"id": self.head["id"], "object": kind, **self.head}


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Reasoning(text):
            return _reasoning(text)
        case Content(text):
            return {"content": text}
        case CallBegun(index, name):
            return {"tool_calls": [{"index": index, **_call(name, "")}]}
        case CallArguments(index, json):
            return {"tool_calls": [{"index": index, "function": {"arguments": json}}]}


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    """The whole message; content is null beside calls only, for clients that take it for a string."""
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    content = "".join(part.text for part in parts if isinstance(part, Content))
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.index].append(part.json)
    calls = [_call(part.name, "".join(arguments[part.index])) for part in parts if isinstance(part, CallBegun)]
    message = {"role": "assistant", "content": content, "refusal": None, **_reasoning(reasoning or None)}
    return {**message, "content": content or None, "tool_calls": calls} if calls else message


def _reasoning(text: str | None) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning": text}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
