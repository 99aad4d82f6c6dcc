"""Import this before a Triton kernel: it then runs in Triton's interpreter, on CPU tensors.

Four things of the interpreter (3.6) are put right, so that results can be compared exactly: it truncates where
chips round to nearest even, multiplies BF16 as if it were integers, spreads the outcome of a comparison of scalars
as if it were of the scalars' type, and, since NumPy 2.4, takes no scalar as a range's bound.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested here")

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_original: Any = interpreter
_patch_tensor, _convert_float = _original._patch_lang_tensor, _original._convert_float
_create_dot, _binary_op = _original.InterpreterBuilder.create_dot, _original.InterpreterBuilder.binary_op
_ROUNDED = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}


def _patched(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", _index)


def _index(self: Any) -> int:
    return int(self.handle.data.item())


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source == tl.float32 and target in _ROUNDED:
        narrow, bits = _ROUNDED[target]
        wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return wide.to(narrow).view(torch.uint8).numpy().view(bits).reshape(data.shape)
    return _convert_float(data, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    wide = [
        interpreter.TensorHandle((m.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if m.dtype.scalar == tl.bfloat16
        else m
        for m in (a, b)
    ]
    return _create_dot(self, *wide, d, precision, imprecise)


def _operation(self: Any, left: Any, right: Any, operation: Any) -> Any:
    result = _binary_op(self, left, right, operation)
    is_truth = result.data.dtype == np.bool_
    return interpreter.TensorHandle(result.data, tl.int1) if is_truth else result


_original._patch_lang_tensor, _original._convert_float = _patched, _convert
_original.InterpreterBuilder.create_dot, _original.InterpreterBuilder.binary_op = _dot, _operation
