"""The demo's tokeniser: byte-level BPE trained on the demo's own texts, digits one by one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from nanoserve.models.demo import arithmetic, conversation, recall, structured, tools
from nanoserve.models.demo.examples import Example
from nanoserve.random_tokenizer import CONTROLS, write_tokenizer_files

VOCAB_SIZE = 2048
_EXAMPLES = 6000


def write_demo_tokenizer(directory: Path, seed: int = 0) -> None:
    """Train the vocabulary and write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Digits are split one by one: sums are learnt far faster on them than on numbers cut anywhere.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]  # a property without a setter's type
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=CONTROLS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_texts(Random(f"vocabulary {seed}")), trainer)
    spec = json.loads(trained.to_str())
    merges = [(left, right) for left, right in spec["model"]["merges"]]
    write_tokenizer_files(directory, spec["model"]["vocab"], merges, spec["pre_tokenizer"])


def _texts(rng: Random) -> Iterator[str]:
    """What the model will read, in about the shares in which it will."""
    makers: tuple[Callable[[Random], Example], ...] = (
        arithmetic.example,
        tools.example,
        structured.example,
        recall.earlier_turn,
        conversation.example,
        lambda rng: recall.long_text(rng, 300),
    )
    for i in range(_EXAMPLES):
        yield from _strings(makers[i % len(makers)](rng))


def _strings(example: Example) -> Iterator[str]:
    for message in example.messages:
        yield str(message["content"])
        yield str(message.get("reasoning_content", ""))
        for call in message.get("tool_calls", ()):
            yield "\n".join(f"<function={call['function']['name']}>\n<parameter={key}>\n{value}\n</parameter>\n</function>"
                            for key, value in call["function"]["arguments"].items())  # fmt: skip
    for tool in example.tools:
        function = tool["function"]
        yield f"<function>\n<name>{function['name']}</name>\n<description>{function['description']}</description>\n<parameters>"
        for key, field in function["parameters"]["properties"].items():
            yield f'\n<parameter>\n<name>{key}</name>\n<type>{field["type"]}</type>\n</parameter>\n<required>["{key}"]</required>'
