"""A benchmark's result for a terminal, and results as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nanoserve import svg
from nanoserve.errors import ConfigError
from nanoserve.files import SHAPES_FOLDER
from nanoserve.plan import size

_LEFT, _WIDTH, _ROW, _GAP = 250, 480, 22, 34
_FLOOR, _OURS, _PEER = "#b0b0b0", "#1f6f8b", "#edae49"


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result in words."""
    options, moved, memory = result["options"], result["bytes_per_token"], result["memory"]
    parts = ", ".join(f"{name} {size(count)}" for name, count in moved.items() if name != "total")
    energy = result["energy"]
    joule = f"{result['tokens_per_joule']:.3g} ({energy['source']})" if energy["joules"] else energy["source"]
    out = [
        f"{result['model']} on {result['device']}: {result['activations']}, KV {result['kv']}, {result['decode']}",
        f"{options['requests'] - 1} requests of {options['isl']:,} and {options['osl']:,} tokens, one before them",
        f"  TTFT P50         {result['ttft_ms']['p50']:.4g} ms",
        f"  TPOT P50, P99    {result['tpot_ms']['p50']:.4g}, {result['tpot_ms']['p99']:.4g} ms",
        f"  ITL P50, P99     {result['itl_ms']['p50']:.4g}, {result['itl_ms']['p99']:.4g} ms",
        f"  throughput       {result['output_tok_s']:.4g} tok/s out, {result['total_tok_s']:.4g} tok/s in all",
        f"  bus              {result['bandwidth_tb_s']:.3g} TB/s read at best",
        f"  bytes a token    {size(moved['total'])} at {result['context']:,.0f} tokens ({parts})",
        f"  floor            {result['floor_ms']:.4g} ms",
        f"  TPOT / floor     {result['tpot_over_floor']:.3g}",
        f"  tokens a joule   {joule}",
        f"  memory           {size(memory['peak'])} at most: weights {size(memory['weights'])}, "
        f"cache {size(memory['cache'])}, other {size(memory['extra'])}",
    ]
    if routing := result["routing"]:
        out.append(
            f"  experts          {routing['tokens']} tokens choose {routing['distinct_experts']:.0f} of a layer "
            f"(by chance {routing['by_chance']:.0f})"
        )
    return out + _table(result["breakdown"]) if "breakdown" in result else out


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The breakdown; a dash where a number is not known."""

    def number(row: Mapping[str, Any], name: str, form: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    head = f"  {'':<28}{'calls':>6}{'launches':>9}{'µs':>10}{'kernels':>10}{'bytes':>9}{'TB/s':>8}{'bus':>6}"
    out = ["", head]
    for row in rows:
        moved = size(row["bytes"]) if "bytes" in row else "-"
        out.append(
            f"  {row['family']:<28}{number(row, 'calls', 'd'):>6}{number(row, 'launches', 'd'):>9}"
            f"{number(row, 'us', '.1f'):>10}{number(row, 'kernel_us', '.1f'):>10}{moved:>9}"
            f"{number(row, 'tb_s', '.3f'):>8}{number(row, 'of_bus', '.0%'):>6}"
        )
    return out


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results that `nanoserve bench --out` wrote.

    Raises:
        ConfigError: a file cannot be read, or holds something else.
    """
    results: list[dict[str, Any]] = []
    for path in paths:
        try:
            data: object = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"result {path}: {error}") from error
        known = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        if not {"tpot_ms", "floor_ms", "shape", "device"} <= known.keys():
            raise ConfigError(f"result {path} holds no benchmark: give files that nanoserve bench --out wrote")
        results.append({**known, "file": path.stem})
    return results


def picture(results: Sequence[Mapping[str, Any]]) -> str:
    """TPOT against the floor, a group a shape, with what other engines took on the same card."""
    peers = json.loads((SHAPES_FOLDER / "peers.json").read_text(encoding="utf-8"))
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for result in results:
        name = result["shape"] or result["model"]
        rows = groups.setdefault(f"{name} on {result['device']}", [])
        rows.append((f"floor, {result['bandwidth_tb_s']:.3g} TB/s", result["floor_ms"], _FLOOR))
        rows.append((f"nanoserve ({result['file']})", result["tpot_ms"]["p50"], _OURS))
        rows += [
            (peer["engine"], peer["value"], _PEER)
            for peer in peers["tpot_ms"]
            if peer["shape"] == result["shape"] and peer["device"] in result["device"]
        ]
    longest = max(value for rows in groups.values() for _, value, _ in rows)
    parts, y = [svg.text(20, 24, "milliseconds a token (TPOT P50), batch 1", bold=True)], 40.0
    for title, rows in groups.items():
        y += _GAP
        parts.append(svg.text(20, y - 8, title, bold=True))
        for label, value, colour in dict.fromkeys(rows):
            parts.append(svg.text(_LEFT - 8, y + 14, label, anchor="end"))
            parts.append(svg.bar(_LEFT, y + 3, value / longest * _WIDTH, _ROW - 6, colour))
            parts.append(svg.text(_LEFT + value / longest * _WIDTH + 6, y + 14, f"{value:.3g} ms"))
            y += _ROW
    parts.append(svg.text(20, y + 28, f"Other engines: {peers['source']}."))
    return svg.document(_LEFT + _WIDTH + 90, y + 44, parts)
