"""Runs the few integer instructions of PTX that our inline assembly is made of, on NumPy arrays.

Triton's interpreter takes other operations in its place; this shows that the assembly computes the same.
"""

import re

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)


def run(text: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """What the assembly leaves in $0 … of its 32-bit outputs, when $outputs … hold the inputs."""
    registers: dict[str, Words] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> Words:
        return registers[name] if name in registers else np.array(int(name, 0), np.uint64)

    for line in re.findall(r"[^;]+;", re.sub(r"\.reg [^;]*;|^\{|\}$", "", text.strip())):
        op, _, rest = line.strip(" \n;").partition(" ")
        names = [name.strip(" {}") for name in rest.split(",")]
        if op == "mov.b64":
            whole = value(names[2])
            registers[names[0]], registers[names[1]] = whole & _LOW, whole >> np.uint64(32)
            continue
        a, b = value(names[1]), value(names[2])
        match op:
            case "and.b32":
                result = a & b
            case "or.b32":
                result = a | b
            case "shr.u32":
                result = a >> b
            case "mul.lo.u32":
                result = a * b
            case "prmt.b32":
                both, picks = a | b << np.uint64(32), int(names[3], 0)
                parts = [
                    (both >> np.uint64(8 * (picks >> 4 * i & 7)) & np.uint64(255)) << np.uint64(8 * i)
                    for i in range(4)
                ]
                result = parts[0] | parts[1] | parts[2] | parts[3]
            case _:
                raise ValueError(f"no such instruction here: {op}")
        registers[names[0]] = result & _LOW
    return [registers[f"${i}"] for i in range(outputs)]
