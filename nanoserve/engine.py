"""The heart: a request in, its tokens out, one sequence at a time.

The engine sees token ids only. It is not thread-safe but for `check`: one thread owns it (`worker.py`).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.cache import Cache, Sequence
from nanoserve.errors import ContextLengthError, EngineError, RequestError
from nanoserve.graph import Decoder
from nanoserve.kernels.sample import NOT_FINITE, SamplerState
from nanoserve.models.nemotron_h import NemotronH
from nanoserve.request import Constraint, Event, Finish, PromptScores, Request, Token, TokenScore, brief
from nanoserve.sampler import SCORE_ROWS, begin_sampling, restrict, token_scores
from nanoserve.step import DecodeBuffers, begin_decode, prefill

Cancelled = Callable[[], bool]

_DAMAGED = "the logits are not finite: a weight of the checkpoint is damaged; download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedRequest(Request):
    """An answer that was given before, run again: not what comes next is asked, but how likely everything was.

    ``prompt`` holds prompt and answer, and ``sampling`` must be of 0 tokens.

    Attributes:
        given: how many ids stand before the answer, in [1, len(prompt) - 1].
        deliver: gets ln p of the vocabulary, float32 [V], for each id of the answer, on the engine's thread.
    """

    given: int
    deliver: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model with its cache.

    Attributes:
        model: weights and ops.
        cache: state of the running sequence.
        buffers: of the decode step.
        sampler: of the running request.
        decoder: runs decode steps over those.
        device: where all of it lives.
        end_ids: the model's own end tokens.
        prefill_chunk: tokens a prefill step takes at most.
    """

    model: NemotronH
    cache: Cache
    buffers: DecodeBuffers
    sampler: SamplerState
    decoder: Decoder
    device: torch.device
    end_ids: frozenset[int]
    prefill_chunk: int

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.cache.shape.max_context

    def check(self, request: Request) -> None:
        """Refuse what cannot be run, before it is queued; safe on any thread.

        Raises:
            RequestError: an empty prompt, an id outside the vocabulary, or a constraint without an end.
            ContextLengthError: the prompt leaves no room for an answer.
        """
        length, vocab = len(request.prompt), self.model.config.vocab_size
        if not all(type(token) is int for token in request.prompt):
            raise RequestError("prompt has an entry that is not a whole number: send token ids", param="prompt")
        if not length:
            raise RequestError("prompt is empty and must have at least one token", param="prompt")
        if length + (request.sampling.max_tokens != 0) > self.max_context:
            raise ContextLengthError(length, self.max_context)
        if request.constraint is not None and request.sampling.ignore_eos:
            raise RequestError(
                "ignore_eos is True, and a constrained answer ends where its constraint says: leave one out",
                param="ignore_eos",
            )
        fields = {
            "prompt": request.prompt,
            "logit_bias": request.sampling.logit_bias,
            "stop_token_ids": request.sampling.stop_token_ids,
        }
        for name, ids in fields.items():
            if ids and (min(ids) < 0 or max(ids) >= vocab):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise RequestError(
                    f"{name} has token id {brief(wrong)} and the vocabulary is [0, {vocab})", param=name
                )

    def generate(self, request: Request, cancelled: Cancelled = lambda: False) -> Generator[Event]:
        """Run a request: prompt scores if asked for, then tokens, then one `Finish`.

        Args:
            request: what to run.
            cancelled: polled once a prefill chunk and once a token.

        Raises:
            RequestError: see `check`.
            EngineError: the model answers with NaN or infinity.
        """
        self.check(request)
        if isinstance(request, ForcedRequest):
            yield from self._force(request, cancelled)
            return
        params = request.sampling
        room = self.max_context - len(request.prompt)
        budget = room if params.max_tokens is None else min(params.max_tokens, room)
        prompt = torch.tensor(request.prompt, dtype=torch.int64, device=self.device)
        with self.cache.sequence(len(request.prompt) + max(budget - 1, 0)) as sequence:
            stream = None
            scores: list[TokenScore | None] = [None]
            for chunk in prompt.split(self.prefill_chunk):
                if cancelled():
                    yield Finish("cancelled")
                    return
                start = sequence.length
                stream = prefill(self.model, self.cache, sequence, chunk)
                if params.prompt_logprobs is not None:
                    following = prompt[start + 1 : start + 1 + len(chunk)]
                    scores += self._score(stream, following, params.prompt_logprobs)
            if params.prompt_logprobs is not None:
                yield PromptScores(tuple(scores))
            if budget and stream is not None:
                yield from self._answer(request, prompt, budget, sequence, stream[-1:], cancelled)
            else:
                yield Finish("length")

    def _answer(
        self,
        request: Request,
        prompt: Tensor,
        budget: int,
        sequence: Sequence,
        stream: Tensor,
        cancelled: Cancelled,
    ) -> Generator[Event]:
        """Decode until an end token, the constraint's end, the budget, or cancellation."""
        params = request.sampling
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self.end_ids)
        begin_sampling(self.sampler, params, prompt, ends)
        begin_decode(self.model, sequence, stream, self.buffers)
        # Making it is the host's work, as every mask is: done while the device runs what is queued.
        constraint = request.constraint() if request.constraint is not None else None
        steps = self.decoder
        steps.begin()
        # Logprobs are of the logits that a token was drawn from: the next step must not have overwritten them.
        ahead = steps.ahead if params.logprobs is None else 0
        for count in range(1, budget + 1):
            if constraint is None:
                steps.run_ahead(sequence, budget, ahead)
            elif not self._draw(constraint):
                yield Finish("stop")
                return
            token = steps.read()
            if token == NOT_FINITE:
                raise EngineError(_DAMAGED)
            yield Token(token, self._token_score(token, params.logprobs))
            if constraint is not None:
                constraint.push(token)
            if token in ends or (constraint is not None and constraint.ended):
                yield Finish("stop")
                return
            if count == budget:
                break
            if cancelled():
                yield Finish("cancelled")
                return
            if constraint is not None:
                steps.advance(sequence)
        yield Finish("length")

    def _draw(self, constraint: Constraint) -> bool:
        """Draw a token that the constraint allows; False when it allows none, for the answer is complete."""
        allowed = constraint.allowed()
        if constraint.ended:
            return False
        restrict(self.sampler, allowed)
        self.decoder.draw()
        return True

    def _force(self, request: ForcedRequest, cancelled: Cancelled) -> Generator[Event]:
        """As an answer is made, prefill and then decode steps, but every step is told its token."""
        ids = torch.tensor(request.prompt, dtype=torch.int64, device=self.device)
        prompt, answer = ids[: request.given], ids[request.given :]
        with self.cache.sequence(len(ids)) as sequence:
            stream = prompt
            for chunk in prompt.split(self.prefill_chunk):
                if cancelled():
                    yield Finish("cancelled")
                    return
                stream = prefill(self.model, self.cache, sequence, chunk)
            begin_decode(self.model, sequence, stream[-1:], self.buffers)
            request.deliver(self._logprobs())
            for token in answer[:-1]:
                if cancelled():
                    yield Finish("cancelled")
                    return
                self.buffers.ids.fill_(token)
                self.decoder.advance(sequence)
                request.deliver(self._logprobs())
        yield Finish("length")

    def _logprobs(self) -> Tensor:
        """Ln p of the vocabulary after the last step, float32 [V]."""
        if not bool(self.buffers.logits.sum().isfinite()):
            raise EngineError(_DAMAGED)
        return self.buffers.logits.log_softmax(dim=-1)

    def _token_score(self, token: int, alternatives: int | None) -> TokenScore | None:
        if alternatives is None:
            return None
        ids = torch.tensor([token], device=self.device)
        return token_scores(self.buffers.logits.unsqueeze(0), ids, alternatives)[0]

    def _score(self, stream: Tensor, following: Tensor, alternatives: int) -> list[TokenScore]:
        """Scores of the tokens that follow those of the residual stream; the last may have none."""
        scores: list[TokenScore] = []
        for rows, ids in zip(stream[: len(following)].split(SCORE_ROWS), following.split(SCORE_ROWS), strict=True):
            if len(ids):
                logits = self.model.logits(rows)
                if not bool(logits.isfinite().all()):
                    raise EngineError(_DAMAGED)
                scores += token_scores(logits, ids, alternatives)
        return scores
