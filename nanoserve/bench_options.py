"""The options of ``nanoserve bench``."""

import argparse
from pathlib import Path
from typing import get_args

from nanoserve.config import ShapeName


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument(
        "--shape",
        choices=get_args(ShapeName),
        help="a released geometry with random weights, instead of MODEL",
    )
    parser.add_argument("--isl", type=int, help="tokens of a prompt (default 2048)")
    parser.add_argument("--osl", type=int, help="tokens of an answer (default 1024)")
    parser.add_argument("--requests", type=int, help="how many, the first of which is not counted (default 5)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default 1)")
    parser.add_argument("--seed", type=int, help="of prompts and draws (default 0)")
    parser.add_argument("--breakdown", action="store_true", help="time, bytes and launches of every op family")
    parser.add_argument("--dense", action="store_true", help="time the NVFP4 product alone; loads no model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="+",
        metavar=("FILE.svg", "RESULT"),
        help="draw results of --out as a picture; runs nothing",
    )
