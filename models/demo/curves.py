"""The training log as a picture: ``python -m nanoserve.models.demo.curves log.jsonl curves.svg``."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoserve import svg

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 210, 60, 30, 60
_LOSSES = ("loss", "draft_loss")
_NOT_SHARES = {"step", "tokens_s", "waited", "at", *_LOSSES}


def curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of two plots over the steps: the losses on a logarithmic scale, and the held-out shares.

    Args:
        lines: the log's objects; those without shares count for the losses only.
    """
    shares = sorted({key for line in lines for key in line} - _NOT_SHARES)
    last = max(line["step"] for line in lines)
    low = min(line[name] for line in lines for name in _LOSSES)
    high = max(line[name] for line in lines for name in _LOSSES)
    floor, ceiling = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = {f"{10.0**power:g}": (power - floor) / (ceiling - floor) for power in range(floor, ceiling + 1)}
    losses = {
        name: [(line["step"] / last, (math.log10(line[name]) - floor) / (ceiling - floor)) for line in lines]
        for name in _LOSSES
    }
    right = {name: [(line["step"] / last, line[name]) for line in lines if name in line] for name in shares}
    parts = [
        _plot("loss (written tokens)", losses, ticks, last, 0),
        _plot("held-out conversations without a wrong token", right, {"0": 0, "50 %": 0.5, "100 %": 1}, last, 1),
    ]
    return svg.document(_LEFT + _WIDTH + 150, 2 * (_TOP + _HEIGHT + _GAP), parts)


def _plot(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    ticks: Mapping[str, float],
    last: int,
    number: int,
) -> str:
    """One plot; all values are in [0, 1] of its width and height."""
    top = _TOP + number * (_TOP + _HEIGHT + _GAP)

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x * _WIDTH, top + (1 - min(max(y, 0), 1)) * _HEIGHT

    out = [svg.text(_LEFT, top - 10, title, bold=True)]
    for label, y in ticks.items():
        out.append(svg.path([at(0, y), at(1, y)], "#ddd"))
        out.append(svg.text(_LEFT - 6, at(0, y)[1] + 4, label, anchor="end"))
    out.append(svg.text(_LEFT + _WIDTH, top + _HEIGHT + 18, f"step {last:,}", anchor="end"))
    for index, (name, points) in enumerate(series.items()):
        colour = svg.COLOURS[index % len(svg.COLOURS)]
        out.append(svg.path([at(x, y) for x, y in points], colour, 1.8))
        out.append(svg.text(_LEFT + _WIDTH + 8, top + 12 + 16 * index, name, colour=colour))
    return "".join(out)


def main() -> None:
    """The command."""
    log, picture = map(Path, sys.argv[1:3])
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    picture.write_text(curves(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
