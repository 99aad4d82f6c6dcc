"""The engine in this process: text in, text out."""

import operator
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.choice import Choice, Piece
from nanoserve.constraint import Constraints
from nanoserve.engine import ForcedRequest
from nanoserve.errors import EngineError, RequestError
from nanoserve.files import DEMO_MODEL
from nanoserve.grammar import Grammar
from nanoserve.machine import configured
from nanoserve.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenScore,
    sampling_defaults,
)
from nanoserve.startup import Prepared, load_engine, prepare
from nanoserve.tokenizer import Tokenizer
from nanoserve.warm_up import Say, silent
from nanoserve.weights import Progress
from nanoserve.worker import Worker

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A string, token ids, or chat messages."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; the end token counts as one of the completion."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added. ``text`` is empty while a character or a possible stop string is incomplete.

    Held-back text may come without a token before the end; the last delta has nothing but the finish reason.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. ``logprobs`` has an entry a token when asked for; ``text`` is "" without a tokeniser."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenScore] | None = None


class LocalEngine:
    """A loaded model. Requests from several threads run one after another. Use it as a context manager."""

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer | None,
        progress: Progress,
        say: Say = silent,
    ) -> None:
        self.tokenizer = tokenizer
        self.prepared = prepared
        self._defaults = sampling_defaults(prepared.checkpoint.generation_config)
        self._worker = Worker(lambda: load_engine(prepared, progress, say), max_queue=1024)
        try:
            self._worker.wait_ready()
        except BaseException:
            self._worker.close()
            raise

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prepared.memory.max_context

    @cached_property
    def _constraints(self) -> Constraints:
        if self.tokenizer is None:
            raise RequestError(
                "grammar and thinking_budget need a tokenizer.json in the checkpoint", param="grammar"
            )
        return Constraints(self.tokenizer, self.prepared.config.vocab_size, self.prepared.end_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            RequestError: text without a tokeniser, messages without a chat template, or an empty prompt.
        """
        if not isinstance(prompt, str):
            return self._encode_items(prompt)
        return self._text().encode(prompt)

    def _encode_items(self, prompt: object) -> list[int]:
        wrong = RequestError("prompt must be a string, a list of token ids or a list of messages", param="prompt")
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
            raise wrong
        items = list(cast("Iterable[Any]", prompt))
        if items and all(isinstance(item, Mapping) for item in items):
            return self._text().encode_chat(items)
        return _token_ids(items, wrong)

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer.json: pass the prompt as token ids", param="prompt"
            )
        return self.tokenizer

    def generate(
        self,
        prompt: Prompt,
        *,
        grammar: Grammar | None = None,
        thinking_budget: int | None = None,
        **sampling: Any,
    ) -> Completion:
        """Answer a prompt.

        Args:
            prompt: a string (continued as it is), chat messages, or token ids.
            grammar: what the answer, or what follows its reasoning, must be: see `nanoserve.grammar`.
            thinking_budget: tokens of reasoning at most, from 0.
            sampling: fields of `SamplingParams`; what is left out comes from the checkpoint's
                generation_config.json, then from the defaults there.

        Raises:
            RequestError: the prompt, a field or the grammar cannot be served as asked.
            EngineError: the engine failed.
        """
        ids = self.encode(prompt)
        deltas = list(self._stream(ids, sampling, grammar, thinking_budget))
        tokens = [token for delta in deltas for token in delta.token_ids]
        scores = [score for delta in deltas for score in delta.logprobs]
        return Completion(
            text="".join(delta.text for delta in deltas),
            token_ids=tokens,
            finish_reason=deltas[-1].finish_reason or "error",
            usage=Usage(len(ids), len(tokens)),
            logprobs=scores if sampling.get("logprobs") is not None else None,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        grammar: Grammar | None = None,
        thinking_budget: int | None = None,
        **sampling: Any,
    ) -> Generator[Delta]:
        """Like `generate`, a delta at a time; closing the iterator cancels the request.

        The request is checked here, before the first delta is asked for.
        """
        return self._stream(self.encode(prompt), sampling, grammar, thinking_budget)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Ln p(token i+1 | tokens up to i), n - 1 values for n tokens.

        Raises:
            RequestError: no tokens, an id outside the vocabulary, or more tokens than the context holds.
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        wrong = RequestError("token_ids must be a list of token ids", param="token_ids")
        ids = _token_ids(token_ids, wrong)
        for piece in self._pieces(Request(tuple(ids), params)):
            if piece.scores:
                return [score.logprob for score in piece.scores.scores if score is not None]
        raise EngineError("the engine ended without scores")

    def logprobs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        """Ln p of the whole vocabulary at each token of an answer that is given.

        Computed as the answer would be, the prompt by prefill and then a decode step a token; 4 bytes a token
        and entry of the vocabulary.

        Args:
            prompt_ids: what stands before, at least one id.
            answer_ids: the answer, at least one id.

        Returns:
            float32 [len(answer_ids), V] on the CPU; row i is given the prompt and the answer's first i tokens.

        Raises:
            RequestError: an empty list, an id outside the vocabulary, or more tokens than the context holds.
        """
        lists: list[list[int]] = []
        for name, given in (("prompt_ids", prompt_ids), ("answer_ids", answer_ids)):
            wrong = RequestError(f"{name} must be a list of at least one token id", param=name)
            lists.append(_token_ids(given, wrong))
            if not lists[-1]:
                raise wrong
        rows: list[Tensor] = []
        request = ForcedRequest(
            (*lists[0], *lists[1]),
            SamplingParams(max_tokens=0, temperature=0.0),
            given=len(lists[0]),
            deliver=lambda row: rows.append(row.cpu()),
        )
        for _ in self._pieces(request):
            pass
        return torch.stack(rows)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        fields = SamplingParams.__dataclass_fields__
        unknown = next((name for name in sampling if name not in fields), None)
        if unknown:
            raise RequestError(f"unknown sampling field {unknown!r}; known are {', '.join(fields)}", param=unknown)
        if sampling.get("prompt_logprobs") is not None:
            raise RequestError(
                "prompt_logprobs is not part of an answer here: use score()", param="prompt_logprobs"
            )
        given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        for name in ("stop", "stop_token_ids"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return SamplingParams(**(self._defaults | given))

    def _stream(
        self, ids: Sequence[int], sampling: Mapping[str, Any], grammar: Grammar | None, budget: int | None
    ) -> Generator[Delta]:
        params = self._params(sampling)
        constraint = None
        if grammar is not None or budget is not None:
            constraint = self._constraints.of(ids, grammar, budget)
        request = Request(tuple(ids), params, constraint=constraint)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer.json in the checkpoint", param="stop")
        self._worker.wait_ready().check(request)
        return self._deltas(request)

    def _deltas(self, request: Request) -> Generator[Delta]:
        with closing(self._pieces(request)) as pieces:
            for piece in pieces:
                token = piece.token
                ids, scores = ((token.id,), (token.score,) if token.score else ()) if token else ((), ())
                yield Delta(piece.text, ids, scores, piece.finish)

    def _pieces(self, request: Request) -> Generator[Piece]:
        choice = Choice(0, request.sampling.stop, self.tokenizer)
        with closing(self._worker.stream(request)) as events:
            for event in events:
                yield from choice.push(event)
                if choice.ended:
                    return

    def close(self) -> None:
        """Cancel what runs, end the worker and free the weights; closing twice is fine."""
        self._worker.close()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _token_ids(items: object, wrong: RequestError) -> list[int]:
    """Whole numbers of any kind (numpy's too) as Python's; booleans are none."""
    if not isinstance(items, Iterable) or isinstance(items, str | bytes):
        raise wrong
    ids: list[int] = []
    for item in cast("Iterable[Any]", items):
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise wrong
        ids.append(operator.index(item))
    return ids


def _quiet(done: int, total: int) -> None:
    """No progress: libraries do not print."""


def load(path: str | Path | None = None, *, progress: Progress = _quiet, **options: Any) -> LocalEngine:
    """Open a checkpoint directory and load it.

    Args:
        path: the directory; None is the demonstration model in the box.
        progress: called with (bytes read, bytes in all).
        options: fields of `EngineConfig`, above the environment and its defaults.

    Raises:
        NanoserveError: the options, the checkpoint, or the memory plan; see `nanoserve.errors`.
    """
    config, _ = configured(options)
    checkpoint = open_checkpoint(DEMO_MODEL if path is None else path)
    tokenizer = Tokenizer.load(checkpoint.directory)
    return LocalEngine(prepare(checkpoint, config), tokenizer, progress)


def generate(
    path: str | Path | None, prompt: Prompt, *, options: Mapping[str, Any] | None = None, **sampling: Any
) -> Completion:
    """Load, answer one prompt, close: the one-liner.

    Args:
        path: the checkpoint directory; None is the demonstration model in the box.
        prompt: a string, chat messages, or token ids.
        options: fields of `EngineConfig`.
        sampling: fields of `SamplingParams`.
    """
    with load(path, **(options or {})) as engine:
        return engine.generate(prompt, **sampling)
