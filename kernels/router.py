"""Which experts a token goes to: sigmoid scores, a correction bias that only chooses, top-k. All float32."""

import torch
from torch import Tensor


def router(
    x: Tensor, gate: Tensor, bias: Tensor, top_k: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Choose experts.

    Args:
        x: [T, H].
        gate: [E, H], BF16 or F32.
        bias: ``e_score_correction_bias``, float32 [E]: added for the choice, not for the weights.
        top_k: experts a token.
        scale: ``routed_scaling_factor``.
        normalize: ``norm_topk_prob``: weights sum to ``scale``.

    Returns:
        (expert ids int32 [T, top_k], weights float32 [T, top_k]).
    """
    scores = torch.sigmoid(x.float() @ gate.float().T)
    ids = torch.topk(scores + bias, top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids.int(), weights * scale
