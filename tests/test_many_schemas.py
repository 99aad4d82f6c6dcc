"""What `many_schemas.py` takes for a fault."""

from typing import Any

import pytest
from many_schemas import Answer, Question, faults

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("value", "finish", "found"),
    [
        ('{"a": "x"}', "stop", []),
        ('{"a": "x\\"<parameter=language>"}', "stop", []),
        ('{"a": "x<parameter=language>', "length", []),
        ('{"a": "x"}</think>', "length", ["tags in content"]),
        ('{"a": "x"}<tool_call>', "stop", ["tags in content", "does not validate"]),
        ('{"b": "x"}', "stop", ["does not validate"]),
    ],
)
def test_a_tag_is_a_fault_outside_strings(value: str, finish: str, found: list[str]) -> None:
    asked = Question("chat", False, None, SCHEMA, frozenset(), "", 1)
    assert [fault.partition(":")[0] for fault in faults(asked, Answer(value, "", "", finish))] == found


def test_beside_a_call_there_is_nothing() -> None:
    arguments: dict[str, Any] = {"beside": "<tool_call>", "reasoning": "", "finish": "tool_calls"}
    asked = Question("tools", False, None, SCHEMA, frozenset(), "", 1)
    assert len(faults(asked, Answer('{"a": "x"}', **arguments))) == 2
