"""POST /v1/completions: the body's fields, and the answer's chunks and object. Pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from nanoserve.choice import Piece
from nanoserve.errors import RequestError
from nanoserve.logprobs import CompletionLogprobs
from nanoserve.parameters import Delivery, Limits, parse_delivery, parse_model, parse_sampling
from nanoserve.protocol import Fields, checked_text, refuse, token_ids
from nanoserve.request import MAX_TOP_LOGPROBS, SamplingParams
from nanoserve.structured import Held, parse_held
from nanoserve.tokenizer import Tokenizer

MAX_PROMPTS = 128
MAX_TOKENS = 2**31
DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

TextOrIds = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A checked body; each prompt is text or ids."""

    prompts: Sequence[TextOrIds]
    sampling: SamplingParams
    delivery: Delivery
    echo: bool
    return_token_ids: bool
    held: Held


def parse_completion(body: Mapping[str, Any], limits: Limits) -> CompletionCall:
    """Check a body.

    Raises:
        RequestError: a field is unknown, not supported, ill-typed or out of range.
    """
    fields = Fields(body)
    parse_model(fields, limits.model)
    prompts = parse_prompts(fields.take("prompt"), limits)
    delivery = parse_delivery(fields)
    if len(prompts) * delivery.choices > MAX_PROMPTS:
        message = f"n is {delivery.choices} for {len(prompts)} prompts: at most {MAX_PROMPTS} answers a request"
        raise RequestError(message, param="n")
    held = parse_held(fields)
    echo, return_ids = fields.boolean("echo"), fields.boolean("return_token_ids")
    max_tokens = fields.integer("max_tokens", 0, MAX_TOKENS)
    logprobs = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    if max_tokens == 0 and not echo:
        raise RequestError("max_tokens is 0 and must be at least 1 without echo", param="max_tokens")
    sampling = parse_sampling(
        fields,
        limits,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )
    fields.done()
    return CompletionCall(prompts, sampling, delivery, echo, return_ids, held)


def parse_prompts(value: object, limits: Limits) -> list[TextOrIds]:
    """A string, an array of strings, an array of ids, or an array of arrays of ids.

    Raises:
        RequestError: it is none of these, or empty, or text without a tokenizer.
    """
    wanted = "a string, token ids, or a non-empty array of either"
    if isinstance(value, str):
        entries: list[Any] = [value]
    elif isinstance(value, list) and value:
        entries = cast("list[Any]", value)
        if isinstance(entries[0], int):  # one prompt of ids; a boolean is refused below
            entries = [entries]
    else:
        refuse("prompt", value, wanted)
    if len(entries) > MAX_PROMPTS:
        message = f"prompt has {len(entries)} prompts and may have at most {MAX_PROMPTS}"
        raise RequestError(message, param="prompt")
    if len({isinstance(entry, str) for entry in entries}) > 1:
        raise RequestError("prompt mixes strings and token ids: send either", param="prompt")
    return [_prompt(entry, limits, wanted) for entry in entries]


def _prompt(entry: object, limits: Limits, wanted: str) -> TextOrIds:
    if isinstance(entry, str):
        if not limits.has_text:
            raise RequestError("this checkpoint has no tokenizer: send the prompt as token ids", param="prompt")
        return checked_text(entry, "prompt")
    if not isinstance(entry, list) or not entry:
        refuse("prompt", entry, wanted)
    return token_ids(cast("object", entry), "prompt", limits.vocab_size)


def encode_prompt(prompt: TextOrIds, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """A prompt's token ids; slow for long texts.

    Raises:
        RequestError: a text that encodes to nothing.
    """
    if not isinstance(prompt, str):
        return prompt
    ids = tuple(tokenizer.encode(prompt)) if tokenizer else ()
    if not ids:
        raise RequestError("prompt is empty: send at least one token", param="prompt")
    return ids


class CompletionWriter:
    """Pieces to OpenAI's chunks, or to one answer.

    Args:
        head: ``id``, ``created`` and ``model``, the same in every chunk.
        tokenizer: for echo and logprobs; None names tokens by id.
        call: the request.
        prompts: token ids of each of the call's prompts.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        call: CompletionCall,
        prompts: Sequence[tuple[int, ...]],
    ) -> None:
        self._head, self._tokenizer, self._call, self._prompts = head, tokenizer, call, prompts
        self._begun: set[int] = set()
        wanted = call.sampling.logprobs
        count = len(prompts) * call.delivery.choices
        self._logprobs = None if wanted is None else [CompletionLogprobs(tokenizer, wanted) for _ in range(count)]

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece's chunks; the echo comes before a choice's first, its finish reason alone in the last."""
        text, logprobs, ids = self._read(piece)
        if text or logprobs or ids:
            yield self._chunk(piece.index, text, logprobs, ids)
        if piece.finish:
            yield self._chunk(piece.index, "", None, [], finish=piece.finish)

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk, if it was asked for."""
        return {**self._top(), "choices": [], "usage": usage}

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one object, without its usage."""
        count = len(self._prompts) * self._call.delivery.choices
        choices = [self._choice(i, [piece for piece in pieces if piece.index == i]) for i in range(count)]
        return {**self._top(), "choices": choices}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        parts = [self._read(piece) for piece in pieces]
        logprobs = [part[1] for part in parts if part[1]]
        merged = {name: [item for table in logprobs for item in table[name]] for name in _LISTS}
        text = "".join(part[0] for part in parts)
        ids = [id for part in parts for id in part[2]]
        return self._entry(index, text, merged if self._logprobs else None, ids, pieces[-1].finish)

    def _read(self, piece: Piece) -> tuple[str, dict[str, Any] | None, list[int]]:
        """A piece's text, logprobs and ids; a choice's first piece brings the echo along."""
        echo = ""
        if self._call.echo and piece.index not in self._begun:
            self._begun.add(piece.index)
            echo = self._echo(piece.index)
        if self._logprobs is None:
            logprobs = None
        else:
            if piece.scores:
                self._logprobs[piece.index].add_prompt(echo, self._ids(piece.index), piece.scores)
            if piece.token:
                self._logprobs[piece.index].add(piece.token)
            logprobs = self._logprobs[piece.index].take()
        return echo + piece.text, logprobs, [piece.token.id] if piece.token else []

    def _echo(self, index: int) -> str:
        prompt = self._call.prompts[index // self._call.delivery.choices]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special=False) if self._tokenizer else ""

    def _ids(self, index: int) -> tuple[int, ...]:
        return self._prompts[index // self._call.delivery.choices]

    def _chunk(
        self, index: int, text: str, logprobs: object, ids: list[int], finish: str | None = None
    ) -> dict[str, Any]:
        last = {"usage": None} if self._call.delivery.include_usage else {}
        ids = ids if self._call.return_token_ids else []
        return {**self._top(), "choices": [self._entry(index, text, logprobs, ids, finish)], **last}

    def _entry(
        self, index: int, text: str, logprobs: object, ids: list[int], finish: str | None
    ) -> dict[str, Any]:
        entry = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**entry, "token_ids": ids} if self._call.return_token_ids else entry

    def _top(self) -> dict[str, Any]:
        return {"id": self._head["id"], "object": "text_completion", **self._head}


_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
