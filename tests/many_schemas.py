"""Answers to many schemas at temperature 1 through a running server; by hand, and not collected by pytest.

    python tests/many_schemas.py URL COUNT SEED [--out FILE]

with a URL such as http://127.0.0.1:8771/v1. It goes on until COUNT answers have ended by themselves; those that
max_tokens cut off are counted apart. Ctrl-C prints what there is.
"""

import argparse
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import httpx
import jsonschema
from schema_maker import Schema, make_schema

TAGS = ("<think", "</think", "<tool_call", "</tool_call", "<function=", "<parameter=")
STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)')
"""A JSON string, or the beginning of one that was cut off. A tag in it is the model's own text, and no leak."""
PERIOD = 80
"""Questions after which doors come again in the same order."""
TOPICS = ("a cat", "Nora, who lives in Oslo", "a small red bag", "the Lund concert", "Tom and his 12 apples")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Args:
        door: chat, tools (one that must be called) or responses.
        budget: tokens of reasoning at most; None turns it off.
    """

    door: str
    streamed: bool
    budget: int | None
    schema: Schema
    features: frozenset[str]
    text: str
    seed: int

    @property
    def kind(self) -> str:
        return self.door + (", streamed" if self.streamed else "") + (", thinking" if self.budget else "")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came.

    Args:
        value: the JSON that is to validate: content, or a call's arguments.
        beside: content beside a call; there must be none.
        finish: stop, tool_calls or length.
    """

    value: str
    beside: str
    reasoning: str
    finish: str


def question(index: int, seed: int) -> Question:
    """A tenth are tools, a fifth responses; half are streamed, and a tenth think."""
    rng = Random(f"{seed} {index}")
    place = index % PERIOD
    door = "tools" if place % 10 == 9 else "responses" if place % 10 > 6 else "chat"
    thinks = place in (9, 59) or (place % 10 == 3 and place < 60)
    schema, features = make_schema(rng)
    text = f"Give me data about {rng.choice(TOPICS)}."
    if index % 8 == 0:
        text = f"{text} Answer as JSON for this schema: {json.dumps(schema)}"
    budget = rng.randint(4, 16) if thinks else None
    return Question(door, place // 10 % 2 == 1, budget, schema, features, text, rng.getrandbits(31))


def ask(client: httpx.Client, asked: Question) -> Answer:
    """One answer.

    Raises:
        RuntimeError: it is an error.
    """
    if asked.door == "responses":
        return _ask_responses(client, asked)
    thinking = {"thinking_token_budget": asked.budget} if asked.budget else {"reasoning_effort": "none"}
    tool = {"type": "function", "function": {"name": "save", "parameters": asked.schema}}
    form = {"type": "json_schema", "json_schema": {"name": "data", "schema": asked.schema, "strict": True}}
    calls = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": asked.text}],
        "max_tokens": 220,
        "temperature": 1,
        "seed": asked.seed,
        "stream": asked.streamed,
        **thinking,
        **(calls if asked.door == "tools" else {"response_format": form}),
    }
    pieces: Counter[str] = Counter()
    texts = {"content": "", "reasoning_content": "", "arguments": ""}
    finish = ""
    for event in _events(client, "/chat/completions", body):
        choice = event["choices"][0]
        message = choice["delta"] if "delta" in choice else choice["message"]
        for call in message.get("tool_calls") or ():
            pieces["calls"] += "id" in call
            texts["arguments"] += call["function"].get("arguments") or ""
        for name in ("content", "reasoning_content"):
            texts[name] += message.get(name) or ""
        finish = choice.get("finish_reason") or finish
    if asked.door == "chat":
        return Answer(texts["content"], "", texts["reasoning_content"], finish)
    if finish != "length" and pieces["calls"] != 1:
        raise RuntimeError(f"{pieces['calls']} calls where one must come")
    return Answer(texts["arguments"], texts["content"], texts["reasoning_content"], finish)


def _ask_responses(client: httpx.Client, asked: Question) -> Answer:
    form = {"type": "json_schema", "name": "data", "schema": asked.schema, "strict": True}
    body: dict[str, Any] = {
        "input": asked.text,
        "max_output_tokens": 220,
        "temperature": 1,
        "stream": asked.streamed,
        "text": {"format": form},
        "reasoning": {"effort": "none"},
    }
    written, final = "", dict[str, Any]()
    for event in _events(client, "/responses", body):
        if event.get("type") == "response.output_text.delta":
            written += event["delta"]
        final = event.get("response", event)
    parts = [(item["type"], part["text"]) for item in final["output"] for part in item.get("content") or ()]
    text, thoughts = ("".join(t for kind, t in parts if kind == wanted) for wanted in ("message", "reasoning"))
    if asked.streamed and written != text:
        raise RuntimeError(f"the stream wrote {written!r}, and its last event {text!r}")
    reason = (final.get("incomplete_details") or {}).get("reason")
    return Answer(text, "", thoughts, "length" if reason == "max_output_tokens" else reason or "stop")


def _events(client: httpx.Client, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a stream, or the one body of a whole answer."""
    with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {response.read().decode()}")
        if not body["stream"]:
            yield json.loads(response.read())
            return
        for line in response.iter_lines():
            if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
                event = json.loads(data)
                if event.get("error"):
                    raise RuntimeError(data)
                yield event


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def faults(asked: Question, answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    found: list[str] = []
    shown = answer.value + answer.beside
    if leaked := [tag for tag in TAGS if tag in STRING.sub("", answer.value) + answer.beside]:
        found.append(f"tags in content: {leaked}")
    if len(answer.reasoning) > 12 and answer.reasoning.strip() in shown:
        found.append("reasoning in content")
    if answer.beside.strip():
        found.append("content beside a call that must be all")
    if answer.reasoning and not asked.budget:
        found.append("reasoning although it is off")
    if answer.finish == "length":
        return found
    if answer.finish != ("tool_calls" if asked.door == "tools" else "stop"):
        found.append(f"finish {answer.finish!r}")
    try:
        value = json.loads(answer.value, parse_constant=_no_constant)
        jsonschema.validate(value, asked.schema, cls=jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError) as error:
        found.append(f"does not validate: {str(error).splitlines()[0]}")
    return found


def run(url: str, count: int, seed: int) -> dict[str, Any]:
    """The summary, as JSON."""
    ended, finishes, features, thought, cut, said = (Counter[str]() for _ in range(6))
    bad: list[dict[str, Any]] = []
    begin, stopped, index = time.monotonic(), False, 0
    with httpx.Client(base_url=url, timeout=120) as client:
        try:
            while ended.total() < count:
                asked = question(index, seed)
                answer, wrong = Answer("", "", "", "error"), list[str]()
                try:
                    answer = ask(client, asked)
                    wrong = faults(asked, answer)
                except (RuntimeError, httpx.HTTPError) as error:
                    wrong = [f"{type(error).__name__}: {error}"]
                index += 1
                (cut if answer.finish == "length" else ended)[asked.kind] += 1
                finishes[answer.finish] += 1
                features.update(asked.features)
                said.update(tag for tag in TAGS if any(tag in text for text in STRING.findall(answer.value)))
                if asked.budget:
                    thought["with reasoning" if answer.reasoning else "without"] += 1
                if wrong:
                    told = {"index": index - 1, "kind": asked.kind, "faults": wrong, "schema": asked.schema}
                    told |= {"answer": answer.value, "beside": answer.beside, "reasoning": answer.reasoning}
                    bad.append(told)
                    print(json.dumps(bad[-1], ensure_ascii=False), flush=True)
                if index % 50 == 0:
                    spent = time.monotonic() - begin
                    print(f"{index} asked, {ended.total()} ended, {len(bad)} bad, {spent:.0f} s", flush=True)
        except KeyboardInterrupt:
            stopped = True
    return {
        "seed": seed,
        "wanted": count,
        "asked": index,
        "ended": ended.total(),
        "cut_short": stopped,
        "faulty": len(bad),
        "faults_in_full": bad,
        "finish_reasons": dict(finishes),
        "ended_by_kind": dict(sorted(ended.items())),
        "cut_by_max_tokens_by_kind": dict(sorted(cut.items())),
        "with_a_thinking_budget": dict(thought),
        "tags_in_json_strings": dict(said),
        "schemas_with": dict(features.most_common()),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--out", type=Path, help="a JSON file for the summary")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    method = (
        "tests/many_schemas.py, one client, one request at a time, over HTTP; temperature 1, 220 tokens at most; "
        "an answer is validated by jsonschema (Draft 2020-12) when it ended by itself; reasoning and tags are "
        "looked for in the content of every answer"
    )
    summary = {"commit": commit.stdout.strip(), "method": method, **run(options.url, options.count, options.seed)}
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
