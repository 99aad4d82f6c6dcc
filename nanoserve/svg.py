"""The few marks that our pictures are made of, as SVG; numbers are in pixels, y downwards."""

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#8d6a4f", "#2e4057", "#b56576")


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """A picture on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'{head} {style}><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def text(x: float, y: float, words: str, *, anchor: str = "", colour: str = "", bold: bool = False) -> str:
    """Words that start at a place, or end or stand there by ``anchor``: "end" or "middle"."""
    marks = (("text-anchor", anchor), ("fill", colour), ("font-weight", "bold" if bold else ""))
    style = "".join(f' {name}="{value}"' for name, value in marks if value)
    return f'<text x="{x:g}" y="{y:.1f}"{style}>{escape(words)}</text>'


def path(points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    """A line through points."""
    places = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path d="M{places}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
