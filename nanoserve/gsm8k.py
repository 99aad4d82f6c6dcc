"""GSM8K, school word problems: the public test file, the 8-shot chain-of-thought prompt, and the grading.

The worked examples are our own, so that no line of the data set stands here.
"""

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, cast

from nanoserve.errors import ConfigError

MAX_TOKENS = 512
"""Of an answer; worked solutions take about 100."""
STOP = ("Question:",)
"""A model that continues the text would go on with a question of its own."""

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])-)?\$?(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
"""A minus counts where nothing stands before it that it could be subtracted from."""

EXAMPLES = (
    (
        "A baker fills 6 trays with 12 rolls each and then sells 45 rolls. How many rolls are left?",
        "The baker makes 6 * 12 = 72 rolls. After selling 45 there are 72 - 45 = 27 rolls left. The answer is 27.",
    ),
    (
        "Ines cycles 14 km to work and the same way back, 5 days a week. How many kilometres does she cycle in "
        "3 weeks?",
        "A day is 2 * 14 = 28 km. A week is 5 * 28 = 140 km. Three weeks are 3 * 140 = 420 km. The answer is 420.",
    ),
    (
        "A jacket costs $80. It is 25% cheaper in a sale, and Omar also has a $6 voucher. What does he pay?",
        "A quarter of $80 is 80 / 4 = $20, so the sale price is 80 - 20 = $60. With the voucher he pays "
        "60 - 6 = $54. The answer is 54.",
    ),
    (
        "There are 18 apples in one basket and twice as many in another. Nine children share all of them equally. "
        "How many apples does a child get?",
        "The second basket has 2 * 18 = 36 apples, so there are 18 + 36 = 54. Each child gets 54 / 9 = 6. "
        "The answer is 6.",
    ),
    (
        "A tank holds 900 litres. A pump fills it at 40 litres a minute while a leak loses 10 litres a minute. "
        "How many minutes does it take to fill the empty tank?",
        "Each minute the tank gains 40 - 10 = 30 litres. It takes 900 / 30 = 30 minutes. The answer is 30.",
    ),
    (
        "Petra is 3 times as old as her son. In 12 years their ages will add up to 72. How old is her son?",
        "Together they will be 2 * 12 = 24 years older, so today their ages add up to 72 - 24 = 48. Petra's age "
        "is 3 parts and her son's is 1 part, 4 parts in all, so a part is 48 / 4 = 12. The answer is 12.",
    ),
    (
        "A printer makes 20 pages a minute for the first 5 minutes and then 30 pages a minute. How many minutes "
        "does it need for 400 pages?",
        "In the first 5 minutes it makes 5 * 20 = 100 pages. The other 400 - 100 = 300 pages take 300 / 30 = 10 "
        "minutes. Together that is 5 + 10 = 15 minutes. The answer is 15.",
    ),
    (
        "A club buys 8 balls at $15 each and 3 nets at $40 each. Its 24 members share the cost equally. How much "
        "does each of them pay?",
        "The balls cost 8 * 15 = $120 and the nets cost 3 * 40 = $120. Together that is 120 + 120 = $240. Each "
        "member pays 240 / 24 = $10. The answer is 10.",
    ),
)
"""(question, worked answer)."""


@dataclass(frozen=True, slots=True)
class GsmProblem:
    """A question of the file and the number that answers it."""

    question: str
    answer: Decimal


def read_problems(path: Path) -> list[GsmProblem]:
    """Read the public file: a JSON object a line with ``question`` and ``answer``, which ends in ``#### 42``.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line is malformed; names file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"data {path}: {error.strerror}: give the GSM8K test file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data {path}: is not UTF-8 text: download the file again") from error
    if not text.strip():
        raise ConfigError(f"data {path}: is empty: download the file again")
    # Not splitlines(), which would also split at separators inside a question.
    lines = text.removesuffix("\n").split("\n")
    return [_problem(line, f"data {path}, line {number}") for number, line in enumerate(lines, 1)]


def _problem(line: str, where: str) -> GsmProblem:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        _refuse(where, "is not JSON and must be an object with question and answer")
    if not isinstance(value, dict):
        _refuse(where, "must be a JSON object with question and answer")
    fields = cast("dict[str, Any]", value)
    for name in ("question", "answer"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            _refuse(where, f"{name} must be a string that is not empty")
    _, marker, after = fields["answer"].rpartition("####")
    number = _NUMBER.fullmatch(after.strip())
    if not marker or number is None:
        _refuse(where, "answer must end in '#### ' and a number, such as '#### 42'")
    return GsmProblem(fields["question"].strip(), _value(number))


def _refuse(where: str, problem: str) -> NoReturn:
    raise ConfigError(f"{where}: {problem}")


def prompt_of(question: str) -> str:
    """The eight worked examples and the question, as text to continue."""
    shots = [f"Question: {asked}\nAnswer: {worked}\n\n" for asked, worked in EXAMPLES]
    return "".join(shots) + f"Question: {question}\nAnswer:"


def last_number(text: str) -> Decimal | None:
    """The last number of an answer, without ``$`` and the commas of thousands; None when there is none."""
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def is_right(problem: GsmProblem, text: str) -> bool:
    """Whether the last number of an answer is the problem's: 42, 42.00 and $42 are the same."""
    return last_number(text) == problem.answer


def _value(number: re.Match[str]) -> Decimal:
    value = Decimal(number["digits"].replace(",", ""))
    return -value if number["sign"] else value
