"""The picture of a training log."""

import xml.etree.ElementTree as ET
from itertools import pairwise

from nanoserve.models.demo.curves import curves

LINES = [
    {"step": 100, "loss": 7.0, "draft_loss": 7.5, "tokens_s": 1, "waited": 0, "at": 1},
    {"step": 200, "loss": 0.7, "draft_loss": 1.5, "tokens_s": 1, "waited": 0, "at": 2, "tools": 0.0, "a<b": 0.25},
    {"step": 400, "loss": 0.07, "draft_loss": 0.5, "tokens_s": 1, "waited": 0, "at": 3, "tools": 1.0, "a<b": 0.5},
]


def test_every_series_is_drawn_to_scale() -> None:
    root = ET.fromstring(curves(LINES))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"loss", "draft_loss", "tools", "a<b", "step 400"} <= set(texts)
    lines = [element.attrib["d"] for element in root.iter(f"{space}path") if element.get("stroke") != "#ddd"]
    assert len(lines) == 4
    points = [tuple(map(float, pair.split(","))) for pair in lines[0][1:].split(" L")]
    assert [x for x, _ in points] == [60 + 760 * part for part in (0.25, 0.5, 1)]
    steps = [b - a for (_, a), (_, b) in pairwise(points)]
    assert abs(steps[0] - steps[1]) < 0.2, "a tenth is a tenth on a logarithmic scale"
