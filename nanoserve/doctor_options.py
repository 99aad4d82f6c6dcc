"""The options of ``nanoserve doctor``."""

import argparse
from pathlib import Path
from typing import get_args

from nanoserve.config import ShapeName


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument(
        "--shape", choices=get_args(ShapeName), help="a released geometry with random weights, instead of MODEL"
    )
    parser.add_argument(
        "--compile",
        metavar="CHIP,…",
        help="compile every kernel for these chips (sm_90, sm_120a, sm_121a; plain sm_120 and sm_121 for Triton "
        "alone) and do nothing else; needs no GPU",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="time the decode backends of the experts anew and keep the fastest",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report there as JSON too")
