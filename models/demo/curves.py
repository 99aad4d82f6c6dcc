"""The training log as a picture: ``python -m nanoserve.models.demo.curves log.jsonl curves.svg``."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 210, 60, 30, 60
_COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#8d6a4f", "#2e4057", "#b56576")
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
    height = 2 * (_TOP + _HEIGHT + _GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 150} {height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'{head} {style}><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def _plot(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    ticks: Mapping[str, float],
    last: int,
    number: int,
) -> str:
    """One plot; all values are in [0, 1] of its width and height."""
    top = _TOP + number * (_TOP + _HEIGHT + _GAP)

    def at(x: float, y: float) -> str:
        return f"{_LEFT + x * _WIDTH:.1f},{top + (1 - y) * _HEIGHT:.1f}"

    out = [f'<text x="{_LEFT}" y="{top - 10}" font-weight="bold">{escape(title)}</text>']
    for label, y in ticks.items():
        place = top + (1 - y) * _HEIGHT
        out.append(f'<path d="M{at(0, y)} L{at(1, y)}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    out.append(f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 18}" text-anchor="end">step {last:,}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " L".join(at(x, min(max(y, 0), 1)) for x, y in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out.append(
            f'<text x="{_LEFT + _WIDTH + 8}" y="{top + 12 + 16 * index}" fill="{colour}">{escape(name)}</text>'
        )
    return "".join(out)


def main() -> None:
    """The command."""
    log, picture = map(Path, sys.argv[1:3])
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    picture.write_text(curves(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
