"""Choosing the next token from logits, on the device, with no random state but (seed, step).

The draw is Gumbel-max: argmax(score + noise), with the noise a hash of (seed, step, token id). So a seed gives the
same tokens on every device up to the rounding of the logits, and a step needs no generator that a CUDA graph
would have to register.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""

NOT_FINITE = -1
"""Takes a token's place when the logits are no numbers: the host must not pass such a token on."""

RING = 16
"""The last tokens drawn that a state holds, for a host that reads behind the device."""

_WORD = 0xFFFFFFFF


@dataclass(slots=True)
class SamplerState:
    """The running request's sampling. Tensors are allocated once and never move; a request refills them.

    Attributes:
        temperature, top_k, top_p, min_p, repetition, presence, frequency: as in `SamplingParams`.
        min_tokens: the tokens in ``ends`` are masked while ``step`` is less.
        seed: 64 bits.
        biased: ``bias`` holds something.
        restricted: only the ids of ``allowed`` may be drawn.
        bias: float32 [V].
        seen: tokens of prompt and answer, bool [V].
        counts: how often each token was generated, float32 [V].
        ends: tokens that end the answer, bool [V].
        step: tokens drawn so far, int64 [1].
        allowed: a bit an id, int32 [ceil(V / 32)]: id i is bit i % 32 of word i // 32.
        staged: the same on the host, pinned where the device is a GPU: what ``allowed`` is copied from.
        drawn: the last of them, int64 [RING]: the n-th (from 0) is at n % RING.
        knobs: the numbers above and ``biased`` once more, float64 [11], for kernels that must not ask the host.
    """

    bias: Tensor
    seen: Tensor
    counts: Tensor
    ends: Tensor
    step: Tensor
    allowed: Tensor
    staged: Tensor
    drawn: Tensor
    knobs: Tensor
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    min_tokens: int = 0
    seed: int = 0
    biased: bool = False
    restricted: bool = False

    @classmethod
    def allocate(cls, vocab_size: int, device: torch.device) -> "SamplerState":
        """A state for one request at a time."""
        words = -(-vocab_size // 32)
        return cls(
            bias=torch.zeros(vocab_size, device=device),
            seen=torch.zeros(vocab_size, dtype=torch.bool, device=device),
            counts=torch.zeros(vocab_size, device=device),
            ends=torch.zeros(vocab_size, dtype=torch.bool, device=device),
            step=torch.zeros(1, dtype=torch.int64, device=device),
            allowed=torch.zeros(words, dtype=torch.int32, device=device),
            staged=torch.zeros(words, dtype=torch.int32, pin_memory=device.type == "cuda"),
            drawn=torch.zeros(RING, dtype=torch.int64, device=device),
            knobs=torch.zeros(11, dtype=torch.float64, device=device),
        )

    @property
    def truncations(self) -> tuple[str, ...]:
        """What keeps tokens from being drawn, in order: min_p, top_k, top_p; nothing, in a greedy draw."""
        if self.temperature < GREEDY_BELOW:
            return ()
        asked = {"min_p": self.min_p > 0, "top_k": 0 < self.top_k < len(self.bias), "top_p": self.top_p < 1}
        return tuple(name for name, is_on in asked.items() if is_on)

    def publish(self) -> None:
        """Fill ``knobs`` from the numbers; in the order that the kernels know them by."""
        numbers = (
            self.temperature,
            self.top_k,
            self.top_p,
            math.log(self.min_p) if self.min_p else -math.inf,
            self.repetition,
            self.presence,
            self.frequency,
            self.min_tokens,
            self.seed & _WORD,
            self.seed >> 32 & _WORD,
            self.biased,
        )
        self.knobs.copy_(torch.tensor(numbers, dtype=torch.float64))


def sample(logits: Tensor, state: SamplerState, out: Tensor) -> None:
    """Draw a token and note it in the state.

    Args:
        logits: float32 [V].
        state: **updated**.
        out: the token, int64 [1], **written**: `NOT_FINITE` where the logits hold NaN or infinity.
    """
    scores = _adjusted(logits, state)
    if state.temperature >= GREEDY_BELOW:
        scores = _truncated(scores / state.temperature, state)
        scores = scores + _gumbel(len(scores), state)
    choice = scores.argmax(dim=-1, keepdim=True)
    state.counts[choice] += 1
    state.seen[choice] = True
    # NaN and infinity show in the sum, which is one pass and 17 times faster than asking every value.
    out.copy_(torch.where(logits.sum().isfinite(), choice, NOT_FINITE))
    state.drawn.index_copy_(0, state.step % RING, out)
    state.step.add_(1)


def _adjusted(logits: Tensor, state: SamplerState) -> Tensor:
    """Bias, penalties, and the masks of min_tokens and of the constraint."""
    scores = logits.clone()
    if state.biased:
        scores += state.bias
    if state.repetition != 1:
        penalised = torch.where(scores > 0, scores / state.repetition, scores * state.repetition)
        scores = torch.where(state.seen, penalised, scores)
    if state.presence or state.frequency:
        scores -= state.presence * (state.counts > 0) + state.frequency * state.counts
    if state.min_tokens:
        scores = scores.masked_fill(state.ends & (state.step < state.min_tokens), -torch.inf)
    if state.restricted:
        scores = scores.masked_fill(~_unpacked(state.allowed)[: len(scores)], -torch.inf)
    return scores


def _unpacked(words: Tensor) -> Tensor:
    """Bits of int32 [W], lowest first, as bool [32 W]."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> places) & 1).flatten().bool()


def _truncated(scores: Tensor, state: SamplerState) -> Tensor:
    """min_p, top_k and top_p as thresholds on the scores; ties at a threshold stay."""
    if state.min_p:
        floor = scores.max() + torch.log(torch.tensor(state.min_p, device=scores.device))
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if 0 < state.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(state.top_k).values[-1], -torch.inf)
    if state.top_p < 1:
        ordered = scores.sort(descending=True).values
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = (before < state.top_p) & (ordered > -torch.inf)
        scores = scores.masked_fill(scores < ordered[kept.sum() - 1], -torch.inf)
    return scores


def _gumbel(count: int, state: SamplerState) -> Tensor:
    """Standard Gumbel noise for every token, float32 [count]."""
    key = _mix(state.step ^ _mix_int(state.seed & _WORD))
    key = _mix(key ^ ((state.seed >> 32) & _WORD))
    bits = _mix(torch.arange(count, device=state.step.device) ^ key)
    # 23 bits and a half: the largest value is 1 - 2^-24, which float32 holds; 1 itself would give infinity.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (xor-shift and multiply, C. Wellons' constants) in int64 lanes."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _WORD
    x ^= x >> 15
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
