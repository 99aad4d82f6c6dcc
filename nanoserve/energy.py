"""The energy that a GPU takes while something runs: NVML's counter, or nvidia-smi's readings, or a reason."""

import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

_INTERVAL_MS = 100


@dataclass(slots=True)
class Energy:
    """Joules, once the block has ended; None where nothing measures them, and ``source`` says why."""

    joules: float | None = None
    source: str = "not measured yet"


@contextmanager
def metered(device: torch.device) -> Generator[Energy]:
    """Measure the energy of the block's run."""
    energy = Energy()
    if device.type != "cuda":
        energy.source = f"nothing measures the energy of a {device.type.upper()}"
        yield energy
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    counter = _Counter.open(uuid)
    meter = counter if isinstance(counter, _Counter) else _Readings.open(uuid, counter)
    if isinstance(meter, str):
        energy.source = meter
        yield energy
        return
    torch.cuda.synchronize(device)
    meter.start()
    yield energy
    torch.cuda.synchronize(device)
    energy.joules, energy.source = meter.stop(), meter.name


@dataclass(slots=True)
class _Counter:
    """NVML's count of millijoules since the driver was loaded."""

    nvml: Any
    handle: Any
    begun: int = 0
    name: str = "NVML's energy counter"

    @classmethod
    def open(cls, uuid: str) -> "_Counter | str":
        """The counter of a GPU, or why there is none."""
        if not find_spec("pynvml"):
            return "pynvml is not installed"
        import pynvml

        nvml: Any = pynvml
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            return f"NVML: {error}"
        return cls(nvml, handle)

    def start(self) -> None:
        self.begun = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def stop(self) -> float:
        return (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.begun) / 1e3


@dataclass(slots=True)
class _Readings:
    """nvidia-smi's power in watts, averaged over the time."""

    command: list[str]
    process: "subprocess.Popen[str] | None" = None
    begun: float = 0.0
    name: str = f"nvidia-smi's power every {_INTERVAL_MS} ms"

    @classmethod
    def open(cls, uuid: str, before: str) -> "_Readings | str":
        """Readings of a GPU, or why there are none, after what came ``before``."""
        command = ["nvidia-smi", "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            float(text)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return f"{before}; nvidia-smi: {type(error).__name__}"
        return cls([*command, "-lms", str(_INTERVAL_MS)])

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.begun = time.monotonic()

    def stop(self) -> float | None:
        assert self.process is not None
        seconds = time.monotonic() - self.begun
        self.process.terminate()
        text, _ = self.process.communicate(timeout=20)
        watts = [float(line) for line in text.split("\n") if line.strip().replace(".", "").isdigit()]
        return sum(watts) / len(watts) * seconds if watts else None
