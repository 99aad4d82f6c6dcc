"""Profiles, picked by the name of the card that is found."""

from collections.abc import Callable

import pytest
import torch

from nanoserve import machine, startup
from nanoserve.config import EngineConfig, build, read_toml
from nanoserve.machine import PROFILES, configured, profile_for


def named(name: str | None) -> Callable[[], str | None]:
    return lambda: name


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx_pro_6000"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("NVIDIA GB10", "dgx_spark"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA H200", None),
        ("NVIDIA GB100", None),
        (None, None),
    ],
)
def test_a_profile_is_picked_by_the_cards_name(name: str | None, profile: str | None) -> None:
    found = profile_for(name)
    assert (found.name if found else None) == profile


def test_every_profile_of_a_card_can_be_picked() -> None:
    names = {path.stem for path in PROFILES.glob("*.toml")}
    assert names == {"cpu", "dgx_spark", "rtx_5090", "rtx_pro_6000"}
    for name in names:
        build(EngineConfig, {}, toml=read_toml(PROFILES / f"{name}.toml")["engine"], env={})


def test_a_profile_stands_between_the_users_choices_and_the_defaults() -> None:
    spark = named("NVIDIA GB10")
    config, profile = configured({}, env={}, found=spark)
    assert profile is not None
    assert (config.memory_fraction, config.dtype) == (0.8, "bfloat16")
    assert configured({}, {"memory_fraction": 0.7}, env={}, found=spark)[0].memory_fraction == 0.7
    environment = {"NANOSERVE_MEMORY_FRACTION": "0.6"}
    assert configured({}, {"memory_fraction": 0.7}, env=environment, found=spark)[0].memory_fraction == 0.6
    assert configured({"memory_fraction": 0.5}, env=environment, found=spark)[0].memory_fraction == 0.5


def test_on_a_cpu_no_profile_is_taken() -> None:
    config, profile = configured({"device": "cpu"}, env={}, found=named("NVIDIA GB10"))
    assert profile is None
    assert (config.memory_fraction, config.dtype) == (EngineConfig().memory_fraction, "auto")
    assert configured({}, env={}, found=named(None)) == (EngineConfig(), None)


def test_memory_that_the_cpu_shares_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver does not count what the system would give up."""

    def shares(device: torch.device) -> bool:
        return True

    def of_the_driver(device: torch.device) -> tuple[int, int]:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(startup, "shares_memory", shares)
    monkeypatch.setattr(torch.cuda, "mem_get_info", of_the_driver)
    on_gpu = startup.free_memory(torch.device("cuda"))
    assert 0.5 < on_gpu / startup.free_memory(torch.device("cpu")) < 2


def test_without_a_gpu_there_is_no_name() -> None:
    assert machine.device_name() is None
