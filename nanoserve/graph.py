"""How a sequence's decode steps reach the device: as one CUDA graph each where every op allows it, else op by op.

The host reads tokens behind the device. It launches a step or two ahead, and each step leaves its token in a ring,
from where a stream of its own copies it to the host: the device waits for nobody. Steps that were launched past an
answer's end have changed the state of a sequence that is discarded, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nanoserve.cache import Cache, Sequence
from nanoserve.errors import EngineError
from nanoserve.kernels.sample import RING, SamplerState
from nanoserve.kernels.table import HOST_BOUND, Ops
from nanoserve.models.nemotron_h import NemotronH
from nanoserve.step import DecodeBuffers, advance, draw

Work = Callable[[], None]
Part = Literal["advance", "step"]
Key = tuple[Part, int, tuple[str, ...]]
"""What a graph is of: slot, and the truncations of the draw."""

AHEAD = 2
"""Steps that a GPU is given before the host has read the last one's token."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why decode steps cannot be a graph: an op's backend, or the device (with no op)."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} on {self.backend} {self.reason}" if self.op else self.reason


def obstacles(ops: Ops, device: torch.device) -> tuple[Obstacle, ...]:
    """What keeps decode steps from being captured; nothing, where they can be."""
    if device.type != "cuda":
        return (Obstacle("", "", f"a {device.type.upper()} has no CUDA graphs"),)
    chosen = ((row.op, row.backend) for row in ops.report)
    return tuple(Obstacle(*pair, HOST_BOUND[pair]) for pair in chosen if pair in HOST_BOUND)


@dataclass(slots=True)
class Decoder:
    """The decode steps of one sequence at a time, and their tokens in order.

    Attributes:
        model: what runs.
        cache: where the sequence's state lives.
        buffers: of a step.
        sampler: of the running request.
        ahead: steps to launch before the last one's token is read.
        graph: captured steps; None runs them op by op.
        mailbox: how tokens come to the host; None where the ring is the host's own memory.
        launched: tokens drawn, or being drawn, since `begin`.
        taken: tokens read since then.
    """

    model: NemotronH
    cache: Cache
    buffers: DecodeBuffers
    sampler: SamplerState
    ahead: int
    graph: "DecodeGraph | None" = None
    mailbox: "Mailbox | None" = None
    launched: int = 0
    taken: int = 0

    @classmethod
    def make(
        cls,
        model: NemotronH,
        cache: Cache,
        buffers: DecodeBuffers,
        sampler: SamplerState,
        capture: Callable[[Work], Work] | None,
    ) -> "Decoder":
        """A decoder; with ``capture``, the common steps are captured here and now.

        Raises:
            EngineError: the capture failed.
        """
        graph, mailbox, ahead = None, None, 0
        if capture is not None:
            graph = DecodeGraph(model, cache, buffers, sampler, capture)
            graph.warm_up()
        if buffers.ids.device.type == "cuda":
            mailbox, ahead = Mailbox.on(buffers.ids.device), AHEAD
        return cls(model, cache, buffers, sampler, ahead, graph, mailbox)

    def begin(self) -> None:
        """A new answer: the sampler's state is fresh and nothing is launched."""
        self.launched = self.taken = 0

    def draw(self) -> None:
        """Launch the draw of a token from the logits that are there."""
        draw(self.model, self.buffers, self.sampler)
        self._post()

    def advance(self, sequence: Sequence) -> None:
        """Launch the last token's way through the model, to the next one's logits."""
        if self.graph is not None:
            self.graph.advance(sequence)
        else:
            advance(self.model, self.cache, sequence, self.buffers)

    def step(self, sequence: Sequence) -> None:
        """`advance` and `draw` as one."""
        if self.graph is None:
            self.advance(sequence)
            self.draw()
        else:
            self.graph.step(sequence)
            self._post()

    def run_ahead(self, sequence: Sequence, budget: int, ahead: int) -> None:
        """Launch steps until ``ahead`` more tokens than the next one are on their way, or all ``budget``.

        The first token is drawn from the prompt's logits.
        """
        while self.launched < min(self.taken + 1 + ahead, budget):
            if self.launched:
                self.step(sequence)
            else:
                self.draw()

    def read(self) -> int:
        """The next token, as soon as it is drawn."""
        assert self.taken < self.launched <= self.taken + RING, (
            "a token is read that was not drawn, or is overwritten"
        )
        place = self.taken % RING
        self.taken += 1
        return int(self.sampler.drawn[place]) if self.mailbox is None else self.mailbox.read(place)

    def _post(self) -> None:
        if self.mailbox is not None:
            self.mailbox.post(self.sampler.drawn, self.launched % RING)
        self.launched += 1


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Brings drawn tokens to the host: pinned memory, and an event a place of the ring that says it is filled."""

    stream: torch.cuda.Stream
    memory: Tensor
    drawn: tuple[torch.cuda.Event, ...]
    filled: tuple[torch.cuda.Event, ...]

    @classmethod
    def on(cls, device: torch.device) -> "Mailbox":
        """A mailbox of a device."""
        events = [tuple(torch.cuda.Event() for _ in range(RING)) for _ in range(2)]
        memory = torch.zeros(RING, dtype=torch.int64, pin_memory=True)
        return cls(torch.cuda.Stream(device), memory, *events)

    def post(self, ring: Tensor, place: int) -> None:
        """Copy a place of the device's ring once the work launched so far is done."""
        self.drawn[place].record()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.drawn[place])
            self.memory[place : place + 1].copy_(ring[place : place + 1], non_blocking=True)
            self.filled[place].record()

    def read(self, place: int) -> int:
        """Wait for a place."""
        self.filled[place].synchronize()
        return int(self.memory[place])


@dataclass(frozen=True, slots=True)
class Capture:
    """Captures work as CUDA graphs that share their memory, for they never run at the same time."""

    pool: Any

    @classmethod
    def new(cls) -> "Capture":
        """With memory of its own."""
        return cls(torch.cuda.graph_pool_handle())

    def __call__(self, work: Work) -> Work:
        """What the work launches, as one launch; nothing runs yet.

        Raises:
            EngineError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others have their own business with the driver.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise EngineError(f"the decode step cannot be captured ({error}): run with --decode eager") from error
        return graph.replay


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """Decode steps as CUDA graphs, one a slot of the cache and way of sampling, captured when first wanted.

    Everything that changes from step to step (token, position, pages, the request's sampling) stands in device
    memory, so a graph serves at any context; only ``Sequence.length`` is counted on the host.
    """

    model: NemotronH
    cache: Cache
    buffers: DecodeBuffers
    sampler: SamplerState
    capture: Callable[[Work], Work]
    captured: dict[Key, Work] = field(default_factory=dict[Key, Work])

    def warm_up(self) -> None:
        """Compile and load every kernel, on a sequence that is thrown away, and capture the common steps."""
        with self.cache.sequence(1) as sequence:
            self.buffers.ids.zero_()
            self.buffers.positions.zero_()
            advance(self.model, self.cache, sequence, self.buffers)
            for top_p in (1.0, 0.95):  # the ways of sampling that most requests ask for
                self.sampler.top_p = top_p
                self.step(sequence)

    def advance(self, sequence: Sequence) -> None:
        """Replay `nanoserve.step.advance`."""
        self._replay("advance", sequence, ())

    def step(self, sequence: Sequence) -> None:
        """Replay `nanoserve.step.advance` and then `nanoserve.step.draw`."""
        self._replay("step", sequence, self.sampler.truncations)

    def _replay(self, part: Part, sequence: Sequence, truncations: tuple[str, ...]) -> None:
        key: Key = (part, sequence.slot, truncations)
        length = sequence.length
        if key not in self.captured:
            if part == "step":
                self._warm_sampling()
            self.captured[key] = self.capture(lambda: self._work(part, sequence))
        self.captured[key]()
        sequence.length = length + 1  # whatever the capture or a stand-in for the graph counted

    def _work(self, part: Part, sequence: Sequence) -> None:
        advance(self.model, self.cache, sequence, self.buffers)
        if part == "step":
            draw(self.model, self.buffers, self.sampler)

    def _warm_sampling(self) -> None:
        """Load the kernels of this way of sampling, which a capture does not allow; a request may be under way."""
        own = self.sampler
        other = SamplerState.allocate(len(own.bias), own.bias.device)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            setattr(other, name, getattr(own, name))
        other.publish()
        self.model.ops.sample(torch.zeros_like(self.buffers.logits), other, torch.zeros_like(self.buffers.ids))
