"""The demo's examinations: disjoint from training, the same for a seed, and graded as they should be."""

from collections.abc import Callable
from random import Random
from typing import Any, get_args

import pytest

from nanoserve.models.demo import arithmetic, conversation, recall, structured, tools
from nanoserve.models.demo.examples import Example, aloud, without_thinking
from nanoserve.models.demo.tasks import HELD_OUT_SEED, Problem, Task, called, grade, problems

MAKERS: dict[str, Callable[[Random], Example]] = {
    "arithmetic": arithmetic.example,
    "tools": tools.example,
    "json": structured.example,
    "recall": lambda rng: recall.long_text(rng, 300, 2),
}


def written(example: Example) -> str:
    """What a perfect model would generate at the turn that is asked for."""
    turn = example.messages[example.ask]
    calls = "".join(
        f"\n<tool_call>\n<function={call['function']['name']}>\n"
        + "".join(f"<parameter={k}>\n{shown(v)}\n</parameter>\n" for k, v in call["function"]["arguments"].items())
        + "</function>\n</tool_call>\n"
        for call in turn.get("tool_calls", ())
    )
    return f"{turn['reasoning_content']}\n</think>\n{turn['content']}{calls}"


def shown(value: Any) -> str:
    """As the template writes an argument."""
    return str(value).replace("'", '"') if isinstance(value, list) else str(value)


@pytest.mark.parametrize("task", get_args(Task))
def test_the_right_answer_is_right_and_a_changed_one_is_not(task: Task) -> None:
    rng = Random(3)
    for _ in range(200):
        example = MAKERS[task](rng)
        problem = Problem(example.prompt, example.tools, example.answer, 1)
        text = written(example)
        assert grade(task, problem, text), text
        other = MAKERS[task](rng)
        if other.answer != example.answer:
            assert not grade(task, problem, written(other))
        assert not grade(task, problem, text.partition("</think>")[0] + "</think>\n")
        assert not grade(task, problem, "")
        assert not grade(task, problem, "<think>" + text.replace("</think>", ""))


@pytest.mark.parametrize("task", get_args(Task))
def test_a_set_is_fixed_by_its_seed_and_kept_out_of_training(task: Task) -> None:
    first = problems(task, 30, HELD_OUT_SEED)
    assert first == problems(task, 30, HELD_OUT_SEED)
    assert first != problems(task, 30, HELD_OUT_SEED + 1)
    for problem in first:
        example = Example((*problem.messages, {"role": "assistant", "content": ""}), None, problem.tools)
        assert example.held_out
        assert problem.messages[-1]["role"] == "user"


def test_word_problems_have_two_to_four_steps_that_add_up() -> None:
    rng, signs = Random(1), {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for _ in range(500):
        example = arithmetic.example(rng)
        steps = example.messages[-1]["reasoning_content"].split("\n")
        assert 2 <= len(steps) <= 4
        for step in steps:
            left, sign, right, _, result = step.rpartition(": ")[2].split()
            assert signs[sign](int(left), int(right)) == int(result)
            if sign == "/":
                assert int(left) % int(right) == 0
        assert steps[-1].endswith(f"= {example.answer}")


def test_a_recall_text_holds_its_fact_once_and_has_its_length() -> None:
    for length in (200, 4096):
        for problem in problems("recall", 5, 1, length):
            text = problem.messages[0]["content"]
            assert text.count(problem.answer) >= 1
            assert len(text.split()) == pytest.approx(
                length / recall.TOKENS_A_WORD, rel=0.2 if length < 999 else 0.03
            )


def test_calls_are_typed_by_the_schema_and_only_one_counts() -> None:
    properties = {"n": {"type": "integer"}, "s": {"type": "string"}, "b": {"type": "boolean"}}
    declared = ({"function": {"name": "f", "parameters": {"properties": properties}}},)
    body = "<parameter=n>\n4\n</parameter>\n<parameter=s>\n4\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n"
    call = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
    assert called(call, declared) == {"name": "f", "arguments": {"n": 4, "s": "4", "b": True}}
    assert called(call + call, declared) is None
    assert called(call.replace("=f>", "=g>"), declared) is None


def test_a_call_with_a_number_of_another_type_is_wrong() -> None:
    declared = ({"function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}},)
    problem = Problem((), declared, {"name": "f", "arguments": {"n": 5}}, 1)
    call = "<tool_call>\n<function=f>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
    assert grade("tools", problem, call)
    assert not grade("tools", problem, call.replace("5", "5.0"))


def test_json_numbers_must_be_of_the_right_type() -> None:
    problem = Problem((), (), {"a": 1}, 1)
    assert grade("json", problem, '</think>\n{"a": 1}')
    assert not grade("json", problem, '</think>\n{"a": true}')
    assert not grade("json", problem, '</think>\n{"a": 1.0}')


def test_examples_without_thinking_keep_what_is_needed() -> None:
    rng = Random(2)
    sums = arithmetic.example(rng)
    loud = aloud(sums).messages[-1]
    assert loud["content"] == f"{sums.messages[-1]['reasoning_content']}\n{sums.messages[-1]['content']}"
    quiet = without_thinking(conversation.example(rng))
    assert not quiet.thinking
    assert not any("reasoning_content" in message for message in quiet.messages)
