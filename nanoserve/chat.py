"""POST /v1/chat/completions: the body's fields, and the answer's chunks and object. Pure functions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nanoserve.choice import Piece
from nanoserve.errors import RequestError
from nanoserve.logprobs import chat_logprob
from nanoserve.parameters import Delivery, Limits, parse_delivery, parse_model, parse_sampling
from nanoserve.protocol import Fields, refuse
from nanoserve.request import MAX_TOP_LOGPROBS, SamplingParams
from nanoserve.tokenizer import Tokenizer

MAX_TOKENS = 2**31
MAX_MESSAGES = 16_384
"""Rendering takes about 40 µs a message, on one of the few threads that prepare requests."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template gets."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    template_kwargs: Mapping[str, Any]
    add_special_tokens: bool = False

    def encode(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Token ids; slow for long chats.

        Raises:
            RequestError: a message is malformed, or the template refuses the chat.
        """
        # The template writes every special token; more of them are none where the tokenizer has none to add.
        if self.add_special_tokens and tokenizer.encode(""):
            refuse("add_special_tokens", True, "false: the chat template writes the special tokens")
        return tuple(
            tokenizer.encode_chat(
                self.messages,
                add_generation_prompt=self.add_generation_prompt,
                template_kwargs=self.template_kwargs,
            )
        )


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked body."""

    conversation: Conversation
    sampling: SamplingParams
    delivery: Delivery


def parse_conversation(fields: Fields) -> Conversation:
    """The fields that decide a chat's prompt.

    Raises:
        RequestError: one of them is missing or ill-typed.
    """
    messages = fields.array("messages", MAX_MESSAGES)
    if not messages:
        raise RequestError("messages must be an array of at least one message", param="messages")
    _check_tool_results(messages)
    return Conversation(
        messages,
        fields.boolean("add_generation_prompt", default=True),
        fields.mapping("chat_template_kwargs"),
        fields.boolean("add_special_tokens"),
    )


def _check_tool_results(messages: Sequence[object]) -> None:
    """OpenAI's wire wants each result to name its call; templates go by the order, and do without."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        given = cast("Mapping[str, object]", message)
        if given.get("role") == "tool" and given.get("tool_call_id") is None:
            refuse(f"messages[{i}].tool_call_id", None, "the id of the call that the message answers")


def parse_chat(body: Mapping[str, Any], limits: Limits) -> ChatCall:
    """Check a body.

    Raises:
        RequestError: a field is unknown, not supported, ill-typed or out of range.
    """
    fields = Fields(body)
    parse_model(fields, limits.model)
    conversation = parse_conversation(fields)
    delivery = parse_delivery(fields)
    sampling = parse_sampling(
        fields, limits, max_tokens=_parse_max_tokens(fields), logprobs=_parse_logprobs(fields)
    )
    fields.done()
    return ChatCall(conversation, sampling, delivery)


def _parse_max_tokens(fields: Fields) -> int | None:
    old, new = (fields.integer(name, 1, MAX_TOKENS) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}: send one of them"
        raise RequestError(message, param="max_completion_tokens")
    return old if new is None else new


def _parse_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    count = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if count and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (count or 0) if wanted else None


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
        logprobs = self._logprobs([piece])
        if piece.text or logprobs:
            yield self._chunk(piece.index, {"content": piece.text}, logprobs=logprobs)
        if piece.finish:
            yield self._chunk(piece.index, {}, finish=piece.finish)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk, if it was asked for."""
        return {**self._top("chat.completion.chunk"), "choices": [], "usage": usage}

    def answer(self, pieces: Sequence[Piece], usage: Mapping[str, Any]) -> dict[str, Any]:
        """The answer in one object."""
        choices = [self._choice(i, [p for p in pieces if p.index == i]) for i in range(self.call.delivery.choices)]
        return {**self._top("chat.completion"), "choices": choices, "usage": usage}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.text for piece in pieces)
        wanted = self.call.sampling.logprobs is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
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
