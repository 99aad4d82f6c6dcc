"""The clients of real projects, unmodified: each program in clients/ talks to a server and checks what it gets.

The programs run in environments of their own, which `.ci/run` makes: `.clients` from clients/requirements.txt, and
clients/node_modules from clients/package.json. Each takes a server's URL, so that it also runs by hand against
`nanoserve run`: the engine here says what the demonstration model does.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, Running, make_tokenizer, running

from nanoserve.request import Event, Request
from nanoserve.tokenizer import Tokenizer

HERE = Path(__file__).parent / "clients"
PYTHON = Path(__file__).parent.parent / ".clients" / "bin" / "python"
HAS_NODE = shutil.which("node") is not None and (HERE / "node_modules").is_dir()
CI = os.environ.get("CI") == "true"
"""There a client that is missing is a failure."""

USER = "<|im_start|>user\n"
CALL = (
    "I call get_weather.\n</think>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "</function>\n</tool_call>"
)
ANSWERS = {
    # What the last turn has in it, and the answer to that.
    "<tool_response>": "I have the result.\n</think>\nThe temperature is 21 and the sky is sunny.",
    "weather in Oslo": CALL,
    "Keep the person": "I call Person.\n</think>\n<tool_call>\n<function=Person>\n<parameter=name>\nAnna\n"
    "</parameter>\n<parameter=age>\n31\n</parameter>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    "JSON": 'The fields are name, age, city.\n</think>\n{"name": "Anna", "age": 31, "city": "Oslo"}',
    "hello": "A greeting.\n</think>\nHello! I am a small demonstration model. How can I help?",
}


class TalkingEngine(FakeEngine):
    """Says what `ANSWERS` has for a chat's last turn, and little to other prompts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(max_context=16_384)
        self._tokenizer = tokenizer

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        _, chat, turn = self._tokenizer.decode(request.prompt, skip_special=False).rpartition(USER)
        known = (answer for needle, answer in ANSWERS.items() if chat and needle in turn)
        self.script = self._tokenizer.encode(next(known, "Well."))
        return super().generate(request, cancelled)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with running(tokenizer, TalkingEngine(tokenizer)) as server:
        yield server


def run(*command: object) -> None:
    """Run a client's program; what it printed is shown when it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # each client is imported once: compiled files only fill the disk
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=HERE, env=env)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-6000:]}"


@pytest.mark.skipif(not PYTHON.exists() and not CI, reason=".clients is missing: see .ci/run")
@pytest.mark.parametrize("program", sorted(HERE.glob("*.py")), ids=lambda path: path.stem)
def test_python(server: Running, program: Path) -> None:
    run(PYTHON, "-W", "ignore", program, server.url)


@pytest.mark.skipif(not HAS_NODE and not CI, reason="node or clients/node_modules is missing: see .ci/run")
@pytest.mark.parametrize("program", sorted(HERE.glob("*.mjs")), ids=lambda path: path.stem)
def test_node(server: Running, program: Path) -> None:
    run("node", program, server.url)
