"""The two phases of a sequence: prefill, a chunk at a time, and decode, a step at a time.

A decode step has two halves: `draw` draws a token and feeds it back, `advance` runs it for the next logits. Both
work between fixed addresses, so that a CUDA graph can hold them once every op has a backend that does not ask the
host (the torch column's attention and experts do); only ``sequence.length`` is the host's. Before it draws for a
constrained request, the host sets a mask, which it works out while the device still advances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.cache import Cache, Sequence
from nanoserve.kernels.sample import SamplerState
from nanoserve.models.layers import Span, span_of
from nanoserve.models.nemotron_h import NemotronH


@torch.inference_mode()
def prefill(model: NemotronH, cache: Cache, sequence: Sequence, ids: Tensor) -> Tensor:
    """Advance a sequence over one chunk of its prompt.

    Args:
        model: the model.
        cache: where the sequence's state lives.
        sequence: advanced by len(ids).
        ids: int64 [T].

    Returns:
        The residual stream after the last layer [T, H].
    """
    stream = model.forward(span_of(ids, sequence, cache, decode=False))
    sequence.length += len(ids)
    return stream


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """What a decode step reads and writes, at addresses that never move.

    Attributes:
        ids: the token to run next, int64 [1]; after a step, the token it drew.
        positions: its position, int64 [1].
        logits: of the last step or of the prompt's end, float32 [V].
    """

    ids: Tensor
    positions: Tensor
    logits: Tensor

    @classmethod
    def allocate(cls, vocab_size: int, device: torch.device) -> "DecodeBuffers":
        """Buffers for one sequence at a time."""
        ids, positions = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        return cls(ids, positions, torch.zeros(vocab_size, device=device))


@torch.inference_mode()
def begin_decode(model: NemotronH, sequence: Sequence, stream: Tensor, buffers: DecodeBuffers) -> None:
    """Set the buffers up, with the logits after the prompt's last token, of [1, H]: the first `draw` is next."""
    model.logits(stream, buffers.logits.unsqueeze(0))
    buffers.positions.fill_(sequence.length)


@torch.inference_mode()
def draw(model: NemotronH, buffers: DecodeBuffers, sampler: SamplerState) -> None:
    """Draw a token from the logits; its id is `NOT_FINITE` where they hold NaN or infinity.

    ``buffers.ids`` gets it, and `advance` runs it.
    """
    model.ops.sample(buffers.logits, sampler, buffers.ids)


@torch.inference_mode()
def advance(model: NemotronH, cache: Cache, sequence: Sequence, buffers: DecodeBuffers) -> None:
    """Run the token in ``buffers``: embedding → layers → head → logits.

    A token that is `NOT_FINITE` counts from the embedding's end and runs as the last one: steps that were launched
    before the host read it must do no harm.
    """
    span = Span(buffers.ids, buffers.positions, sequence, cache, decode=True)
    model.logits(model.forward(span), buffers.logits.unsqueeze(0))
    buffers.positions.add_(1)
    sequence.length += 1
