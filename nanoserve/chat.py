"""POST /v1/chat/completions: the body's fields. Pure functions; `chat_answer.py` writes the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nanoserve.choice import Reading
from nanoserve.errors import RequestError
from nanoserve.parameters import Delivery, Limits, parse_delivery, parse_model, parse_sampling
from nanoserve.protocol import Fields, refuse
from nanoserve.reasoning import Thinking, opening, parse_thinking
from nanoserve.request import MAX_TOP_LOGPROBS, SamplingParams
from nanoserve.structured import Held, parse_held
from nanoserve.tokenizer import Tokenizer
from nanoserve.tools import Tools, parse_tools

MAX_TOKENS = 2**31
MAX_MESSAGES = 16_384
"""Rendering takes about 40 µs a message, on one of the few threads that prepare requests."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template gets."""

    messages: Sequence[Mapping[str, Any]]
    tools: Tools
    thinking: Thinking
    add_generation_prompt: bool
    add_special_tokens: bool = False

    def encode(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Token ids; slow for long chats.

        Raises:
            RequestError: a message is malformed, or the template refuses the chat or lacks a switch.
        """
        # The template writes every special token; more of them are none where the tokenizer has none to add.
        if self.add_special_tokens and tokenizer.encode(""):
            refuse("add_special_tokens", True, "false: the chat template writes the special tokens")
        return tuple(
            tokenizer.encode_chat(
                self.messages,
                tools=self.tools.declared or None,
                add_generation_prompt=self.add_generation_prompt,
                template_kwargs=self.thinking.switches(tokenizer.switches),
            )
        )


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked body."""

    conversation: Conversation
    sampling: SamplingParams
    delivery: Delivery
    held: Held

    def reading(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> Reading:
        """How an answer to the encoded prompt is read.

        Where the template has switched reasoning off, thoughts that come all the same are content if there is
        no other.
        """
        tools, thinking = self.conversation.tools, self.conversation.thinking
        begins = opening(tokenizer, prompt)
        return Reading(
            tools.schemas,
            thinking=begins.thinking,
            nonempty=thinking.nonempty or begins.closed,
            single=not tools.parallel,
            hide_calls=tools.forbidden,
            verbatim=self.held.verbatim,
            stop=self.sampling.stop,
        )


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
        parse_tools(fields),
        parse_thinking(fields),
        fields.boolean("add_generation_prompt", default=True),
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
    held = parse_held(fields, conversation.tools)
    sampling = parse_sampling(
        fields, limits, max_tokens=_parse_max_tokens(fields), logprobs=_parse_logprobs(fields)
    )
    fields.done()
    return ChatCall(conversation, sampling, delivery, held)


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
