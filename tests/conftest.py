"""What several test files share: engines over small checkpoints, on one thread so that runs are comparable."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fake_engine import Running

    from nanoserve.tokenizer import Tokenizer

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny matrices: a second thread only waits, for long on a busy machine
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which looks once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU, whatever the machine has

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
DATA = HERE / "data"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs in every run, whatever ran before."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(1234)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default random checkpoint, with tokeniser."""
    from nanoserve.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random checkpoint into the test's own folder."""
    from nanoserve.random_checkpoint import write_random_checkpoint

    def make(name: str = "model", **options: Any) -> Path:
        return write_random_checkpoint(tmp_path / name, **options)

    return make


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory that lacks weights only."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> "Tokenizer":
    """The random one with the released templates' control tokens, of 512 ids."""
    from fake_engine import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(tokenizer: "Tokenizer") -> "Iterator[Running]":
    """A server over a fake engine, for clients; its key is "key"."""
    from fake_engine import FakeEngine, running

    with running(tokenizer, FakeEngine(max_context=2048), api_key="key") as server:
        yield server
