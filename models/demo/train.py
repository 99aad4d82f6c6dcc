"""Trains the demo model: ``python -m nanoserve.models.demo.train --out DIRECTORY``.

The run that made the shipped checkpoint took 20 minutes of an H100, in three segments (training/log.jsonl). With
--stop-after a run is cut so, for machines that are lent for minutes at a time: the same command again goes on
where the last one stopped. Data and first weights are fixed by seeds; sums on a GPU are not, so another run gives
a model as good and not the same bytes. Those of this one are kept: see original.py.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from nanoserve.models.demo import released
from nanoserve.models.demo.corpus import ROW, Rows, write_calibration
from nanoserve.models.demo.network import Network
from nanoserve.models.demo.progress_set import ProgressSet, measure
from nanoserve.models.demo.vocabulary import write_demo_tokenizer

SEED = 1
STEPS = 6400
BATCH = 8
"""Rows a step, of `ROW` tokens each."""
PEAK_RATE = 2e-3
_WARM_UP, _FALL_FROM = 200, 0.4
_DRAFT_WEIGHT = 0.3
_BALANCE_SPEED = 1e-3


def learning_rate(step: int, steps: int) -> float:
    """Up over the first steps, flat, then down in a straight line to a fiftieth."""
    fall = max(0.0, (step / steps - _FALL_FROM) / (1 - _FALL_FROM))
    return PEAK_RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - 0.98 * fall)


class Muon:
    """Momentum, made orthogonal: the update of matrices and stacks of them (K. Jordan, 2024).

    The update's root mean square is that of AdamW (0.2 of the rate), so both share one rate.
    """

    def __init__(self, weights: Iterable[Tensor], momentum: float = 0.95, decay: float = 0.05) -> None:
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in weights:
            groups.setdefault(tuple(weight.shape), []).append(weight)
        self._groups = list(groups.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self._groups]
        self._momentum, self._decay = momentum, decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update."""
        for weights, momentum in zip(self._groups, self.momenta, strict=True):
            gradient = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            momentum.lerp_(gradient, 1 - self._momentum)
            update = _orthogonal(gradient.lerp(momentum, self._momentum))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5 * rate
            for weight, one in zip(weights, update, strict=True):
                weight.mul_(1 - rate * self._decay).sub_(one * scale)


def _orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, by five Newton-Schulz steps in bfloat16."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.bfloat16().mT if tall else x.bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return (y.mT if tall else y).float()


def loss_of(network: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss of the next token, loss of the draft against the trunk's own opinion), means over the weights."""
    logits, drafted = network(batch["ids"], batch["place"])
    weights = batch["weights"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
    main = (each * weights.flatten()).sum() / weights.sum()
    opinion = logits[:, 1:-1].detach().softmax(dim=-1)
    later = batch["weights"][:, 2:] * (batch["place"][:, 2:] >= 2)
    distance = -(opinion * drafted[:, :-2].log_softmax(dim=-1)).sum(dim=-1)
    return main, (distance * later).sum() / later.sum()


@dataclass(slots=True)
class Trainer:
    """Network, optimisers and what a segment must hand to the next."""

    network: Network
    muon: Muon
    adam: torch.optim.AdamW
    step: int = 0
    segment: int = 0

    @classmethod
    def begin(cls, device: torch.device) -> "Trainer":
        """Fresh weights."""
        torch.manual_seed(SEED)
        network = Network(released.config()).to(device)
        inner = [p for name, p in network.named_parameters() if _is_inner(name, p)]
        outer = [p for name, p in network.named_parameters() if not _is_inner(name, p)]
        adam = torch.optim.AdamW(
            outer, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )
        return cls(network, Muon(inner), adam)

    def save(self, file: Path) -> None:
        """For the next segment."""
        state = {"network": self.network.state_dict(), "adam": self.adam.state_dict(), "muon": self.muon.momenta}
        whole = file.with_suffix(".new")
        torch.save({**state, "step": self.step, "segment": self.segment + 1}, whole)
        os.replace(whole, file)  # so that an end amid the writing leaves the last state

    def load(self, file: Path) -> None:
        """What the last segment saved."""
        device = self.network.embeddings.device
        state = torch.load(file, weights_only=True, map_location=device)
        self.network.load_state_dict(state["network"])
        self.adam.load_state_dict(state["adam"])
        self.muon.momenta, self.step, self.segment = state["muon"], state["step"], state["segment"]

    def update(self, batch: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
        """One step; the two losses."""
        rate = learning_rate(self.step, steps)
        self.network.hold()
        main, draft = loss_of(self.network, batch)
        (main + _DRAFT_WEIGHT * draft).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.muon.step(rate)
        self.adam.step()
        for parameter in self.network.parameters():
            parameter.grad = None
        self.network.balance(_BALANCE_SPEED * rate / PEAK_RATE)
        self.step += 1
        return main.detach(), draft.detach()


def _is_inner(name: str, parameter: Tensor) -> bool:
    """A matrix inside the network: not embeddings, head, router or convolution."""
    outer = ("embeddings", "head.weight", "gate", "conv_weight")
    return parameter.ndim >= 2 and not name.endswith(outer)


def train(options: argparse.Namespace) -> None:
    """Segments until the steps are done; then the checkpoint."""
    started, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    out: Path = options.out
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    write_demo_tokenizer(out / "tokenizer")
    trainer = Trainer.begin(device)
    if (out / "state.pt").exists():
        trainer.load(out / "state.pt")
    data = Rows(out / "tokenizer", 1000 * SEED + trainer.segment)
    loader = iter(DataLoader(data, options.batch, num_workers=options.workers, pin_memory=device.type == "cuda",
                             prefetch_factor=4 if options.workers else None))  # fmt: skip
    if not options.eager:
        trainer.network.compile_layers()
    progress = ProgressSet.make(out / "tokenizer", options.batch, options.progress_count)
    log = (out / "log.jsonl").open("a", encoding="utf-8")
    waited, since, losses = 0.0, time.monotonic(), list[tuple[Tensor, Tensor]]()
    while trainer.step < options.steps and time.monotonic() - started < options.stop_after:
        asked = time.monotonic()
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        batch |= {key: batch[key].long() for key in ("ids", "place")}
        waited += time.monotonic() - asked
        losses.append(trainer.update(batch, options.steps))
        if trainer.step % options.every == 0 or trainer.step in (1, 20):
            main, draft = (torch.stack(parts).mean().item() for parts in zip(*losses, strict=True))
            if not math.isfinite(main + draft):
                sys.exit(f"step {trainer.step}: the loss is {main}, {draft}; the last state stays as it was")
            if trainer.step % (options.every * 5) == 0:
                trainer.save(out / "state.pt")
            seconds = time.monotonic() - since
            line: dict[str, Any] = {
                "step": trainer.step,
                "loss": main,
                "draft_loss": draft,
                "tokens_s": round(len(losses) * options.batch * ROW / seconds),
                "waited": round(waited / seconds, 3),
                "at": round(time.monotonic() - started),
            }
            if trainer.step % (options.every * 2) == 0:
                line |= measure(trainer.network, progress, device)
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(json.dumps(line), file=sys.stderr, flush=True)
            waited, since, losses = 0.0, time.monotonic(), []
    trainer.save(out / "state.pt")
    digest = released.write(trainer.network, out / "bf16")
    write_calibration(out / "tokenizer", out / "calibration.jsonl")
    final = {
        "step": trainer.step,
        "of": options.steps,
        "sha256": digest,
        **measure(trainer.network, progress, device),
    }
    (out / "result.json").write_text(json.dumps(final, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(final), file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for state, log and checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows of {ROW} tokens a step")
    parser.add_argument("--workers", type=int, default=14, help="processes that make data; a part of the seed")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="SECONDS", help="end this segment then")
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--progress-count", type=int, default=150, help="held-out conversations a task")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
