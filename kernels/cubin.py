"""What a compiled kernel takes, read out of a cubin: registers, stack and static shared memory.

A cubin is an ELF file. Its sections ``.nv.info`` hold records of (format, attribute, size, body); of their
attributes, which NVIDIA's cuobjdump prints by name, two are read here. No tool of the CUDA toolkit is needed.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

RESERVED = 1024
"""Bytes of static shared memory that are the machine's own; a block's limit is without them."""

_SIZED = 4
"""Format of a record with a body; the others are four bytes in all."""
_FRAME_SIZE, _REGISTER_COUNT = 0x11, 0x2F
_SYMBOL_TABLE = 2


@dataclass(frozen=True, slots=True)
class Resources:
    """A kernel's needs: registers a thread, bytes of stack a thread, bytes of static shared memory a block.

    With CUDA C++, `RESERVED` bytes of that memory are none of the kernel's.
    """

    name: str
    registers: int
    stack: int
    shared: int


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    data: bytes
    size: int


def resources(cubin: bytes) -> tuple[Resources, ...]:
    """Every kernel of a cubin.

    Raises:
        ValueError: the bytes are no 64-bit ELF file.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no cubin: not a 64-bit ELF file")
    sections = tuple(_sections(cubin))
    symbols = _symbols(sections)
    registers, stacks = dict[str, int](), dict[str, int]()
    for section in sections:
        if section.name == ".nv.info":
            for attribute, (symbol, value) in _records(section.data):
                into = registers if attribute == _REGISTER_COUNT else stacks
                into[symbols[symbol]] = value
    shared = {section.name.removeprefix(".nv.shared."): section.size for section in sections}
    return tuple(Resources(name, n, stacks.get(name, 0), shared.get(name, 0)) for name, n in registers.items())


def _sections(cubin: bytes) -> Iterator[_Section]:
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    rows = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    text = rows[names][4]
    for row in rows:
        start, size = row[4], row[5]
        yield _Section(_text(cubin, text + row[0]), row[1], cubin[start : start + size], size)


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _symbols(sections: tuple[_Section, ...]) -> list[str]:
    """Names by their index in the symbol table."""
    strings = next(section.data for section in sections if section.name == ".strtab")
    table = next(section.data for section in sections if section.kind == _SYMBOL_TABLE)
    return [_text(strings, struct.unpack_from("<I", table, at)[0]) for at in range(0, len(table), 24)]


def _records(data: bytes) -> Iterator[tuple[int, tuple[int, int]]]:
    """(attribute, (symbol, value)) of the two attributes that are read."""
    at = 0
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _SIZED:
            if attribute in (_FRAME_SIZE, _REGISTER_COUNT):
                yield attribute, struct.unpack_from("<II", data, at)
            at += size
