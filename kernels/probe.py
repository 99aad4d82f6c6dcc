"""Looks at this machine: the one place where what backends depend on is asked of it."""

from importlib.util import find_spec

import torch

from nanoserve.kernels import flashinfer_ops, nvrtc
from nanoserve.kernels.place import SM12X, Experts, Package, Place


def place_of(device: torch.device, dtype: torch.dtype, experts: Experts | None = None) -> Place:
    """This machine as backends see it.

    FlashInfer is imported, to see whether it can be, only on chips that could use it.

    Args:
        device: where the model runs.
        dtype: the activations'.
        experts: the model's; None where it has none.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return Place("cpu", None, dtype, experts=experts)
    chip = torch.cuda.get_device_capability(device)
    packages = {
        "triton": Package(flashinfer_ops.package_version("triton")) if find_spec("triton") else Package(),
        "cuda-bindings": Package(flashinfer_ops.package_version("cuda-bindings"), nvrtc.missing() or ""),
    }
    if chip not in SM12X:
        return Place("cuda", chip, dtype, packages, experts=experts)
    toolkit, compiler = flashinfer_ops.toolkit()
    packages |= flashinfer_ops.packages()
    return Place("cuda", chip, dtype, packages, toolkit, compiler, flashinfer_ops.built(), experts)
