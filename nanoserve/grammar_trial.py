"""A program of its own, run by `grammar.py`: compiles one grammar and follows it for some steps, within limits.

A grammar comes from a client, and compiling it is native code that nobody can interrupt: deep references overflow
its stack, and some schemas take minutes or gigabytes. Here that ends this process and not the server.

Input: a line of JSON, {"grammar", "ebnf", "end_ids", "limits"}, then a line of hexadecimal bytes for every token.
Output: a line of JSON, {"grammar"} with the grammar to compile, or {"error"}. No output at all is a refusal too.
"""

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

COMPILE_SECONDS = 1.0
"""Of processor time: the server's own thread will need as much again."""
WALK_STEPS, WALK_SECONDS = 32, 0.5
CPU_SECONDS = 2
"""All of it; whole seconds are all that the system counts."""
MEMORY = 400 << 20
"""Bytes that the compilation may take."""
STACK = 1 << 20
"""Bytes; half of the least that a thread of the server has."""


class Vocabulary(TokenizerWrapper):
    """Token ids and bytes, in the shape that llguidance asks for.

    Args:
        tokens: bytes of every id; b"" never matches anything.
        end_ids: end an answer.
        encode: text to ids, for text that a grammar leaves no choice about.
    """

    def __init__(
        self, tokens: Sequence[bytes], end_ids: Sequence[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens, self.end_ids, self.special_token_ids = tokens, end_ids, ()
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._encode(text)


def trial(grammar: str, tokenizer: LLTokenizer, limits: LLParserLimits) -> str | None:
    """What is wrong with a grammar, in words; None when nothing is."""
    started = time.process_time()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher.get_error()
    if time.process_time() - started > COMPILE_SECONDS:
        return "it takes too long to compile"
    return _walk(matcher, frozenset(tokenizer.eos_tokens))


def _walk(matcher: LLMatcher, ends: frozenset[int]) -> str | None:
    """Follow the grammar with tokens from all over the vocabulary: what fails here would fail in an answer."""
    started = time.process_time()
    for step in range(WALK_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error() if step else "no text can match it"
        token = _draw(mask, ends, step)
        if token is None:
            return None
        if not matcher.consume_token(token):
            return matcher.get_error()
        if matcher.is_stopped():
            return None
        if time.process_time() - started > WALK_SECONDS:
            return "it takes too long to follow"
    return None


def _draw(mask: bytes, ends: frozenset[int], step: int) -> int | None:
    """One of the allowed ids but the ends: the first from a place on that differs from step to step."""
    bits = int.from_bytes(mask, "little")
    for end in ends:
        bits &= ~(1 << end)
    if not bits:
        return None
    rest = bits >> (place := step * 0x9E3779B1 % bits.bit_length())
    return place + (rest & -rest).bit_length() - 1


def _main() -> None:
    head: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    tokens = [bytes.fromhex(line) for line in sys.stdin.read().split("\n")]
    vocabulary = Vocabulary(tokens, head["end_ids"], lambda text: tokenizer.greedy_tokenize(text))
    tokenizer = LLTokenizer(vocabulary, eos_token=head["end_ids"], slices=[])
    answer: dict[str, str] = {}

    def work() -> None:
        try:
            grammar: str = gbnf_to_lark(head["grammar"]) if head["ebnf"] else head["grammar"]
        except Exception as error:  # noqa: BLE001  (the converter raises no narrower class)
            answer["error"] = f"{type(error).__name__}: {error}"
            return
        wrong = trial(grammar, tokenizer, LLParserLimits(**head["limits"]))
        answer.update({"error": wrong} if wrong is not None else {"grammar": grammar})

    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.readline().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
