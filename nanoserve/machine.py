"""The card that is found, and the profile shipped for it: ``profiles/*.toml``, as defaults of the options."""

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoserve.config import EngineConfig, build, read_toml

PROFILES = Path(__file__).parent / "profiles"
"""One TOML file a machine."""

_PATTERNS: Mapping[str, str] = {
    "rtx_pro_6000": r"\bRTX PRO 6000\b",
    "rtx_5090": r"\bRTX 5090\b(?! (D|Laptop))",
    "dgx_spark": r"\bGB10\b",
}
"""Profile → the device names that it is for, as CUDA spells them. A 5090 D and a laptop's are other cards."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A shipped profile: its name, the device it was picked for, and its ``[engine]`` table."""

    name: str
    device: str
    engine: Mapping[str, object]


def device_name() -> str | None:
    """The first card that torch sees."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def profile_for(name: str | None) -> Profile | None:
    """The profile of a device, or None where none is shipped.

    Args:
        name: the device's, as CUDA spells it.
    """
    if name is None:
        return None
    for profile, pattern in _PATTERNS.items():
        if re.search(pattern, name):
            return Profile(profile, name, read_toml(PROFILES / f"{profile}.toml")["engine"])
    return None


def configured(
    options: Mapping[str, object],
    toml: Mapping[str, object] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    found: Callable[[], str | None] = device_name,
) -> tuple[EngineConfig, Profile | None]:
    """The engine's options, with the found device's profile between the user's TOML file and the defaults.

    Args:
        options: what the caller set.
        toml: the user's ``[engine]`` table.
        env: the environment; defaults to ``os.environ``.
        found: name of the device.

    Raises:
        ConfigError: as `nanoserve.config.build`.
    """
    plain = build(EngineConfig, options, toml=toml, env=env)
    if plain.device == "cpu" or (profile := profile_for(found())) is None:
        return plain, None
    return build(EngineConfig, options, toml={**profile.engine, **(toml or {})}, env=env), profile


def driver_version() -> str | None:
    """The driver's version, as the kernel module or nvidia-smi tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match[0] if match else None
