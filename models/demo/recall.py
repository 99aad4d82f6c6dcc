"""Finding a fact that stands somewhere in a long text, or was told in an earlier turn."""

from collections.abc import Callable
from random import Random
from typing import Any

from nanoserve.models.demo.examples import Example, chat, turn
from nanoserve.models.demo.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    DAYS,
    FOODS,
    HOBBIES,
    JOBS,
    PLACES,
    THINGS,
    city,
    code,
    made_up,
    name,
)

TOKENS_A_WORD = 1.128
"""Of the text below, in the demo's own vocabulary; a test holds it to 3 %."""

_Fact = tuple[str, str, str, str]
"""(what it is about, sentence, question, answer)."""


def _filler(rng: Random) -> str:
    pick = rng.choice
    return pick(_FILLERS)(pick)


_Pick = Callable[..., Any]
_FILLERS: tuple[Callable[[_Pick], str], ...] = (
    lambda p: f"The {p(JOBS)} walked to the {p(PLACES)} on {p(DAYS)}.",
    lambda p: f"A {p(COLOURS)} {p(ANIMALS)} slept beside the {p(ADJECTIVES)} {p(PLACES)}.",
    lambda p: f"It was a {p(ADJECTIVES)} morning, and the {p(JOBS)} drank some {p(FOODS)}.",
    lambda p: f"Nobody in {p(CITIES)} had seen such {p(COLOURS)} {p(THINGS)} before.",
    lambda p: f"The {p(ANIMALS)} looked at the {p(ANIMALS)} and went away.",
    lambda p: f"On {p(DAYS)} the {p(JOBS)} and the {p(JOBS)} talked about {p(HOBBIES)}.",
    lambda p: f"There were {p(THINGS)} and {p(THINGS)} on the table in the {p(PLACES)}.",
    lambda p: f"The road from {p(CITIES)} to {p(CITIES)} was {p(ADJECTIVES)} and {p(ADJECTIVES)}.",
    lambda p: f"After the {p(FOODS)} came the {p(FOODS)}, and everyone was happy.",
    lambda p: f"The {p(PLACES)} near the {p(PLACES)} has a {p(COLOURS)} door.",
    lambda p: f"In the evening the {p(JOBS)} wrote a letter about {p(THINGS)}.",
    lambda p: f"Some people say that the {p(ADJECTIVES)} {p(PLACES)} is in {p(CITIES)}.",
    lambda p: f"The {p(JOBS)} likes {p(HOBBIES)} more than {p(HOBBIES)}.",
    lambda p: f"When the rain came, the {p(ANIMALS)} ran into the {p(PLACES)}.",
)


def fact(rng: Random) -> _Fact:
    """One fact with its question."""
    kind = rng.randrange(7)
    if kind == 0:
        about = f"{rng.choice([*COLOURS, *ADJECTIVES])} {rng.choice(PLACES)}"
        value = code(rng)
        return (about, f"The code of the {about} is {value}.",
                rng.choice((f"What is the code of the {about}?", f"Which code does the {about} have?")), value)  # fmt: skip
    if kind == 1:
        who, what, value = name(rng), *rng.choice((("colour", rng.choice(COLOURS)), ("animal", rng.choice(ANIMALS)),
                                                   ("food", rng.choice(FOODS)), ("day", rng.choice(DAYS))))  # fmt: skip
        return (f"{who} {what}", f"The favourite {what} of {who} is {value}.",
                rng.choice((f"What is the favourite {what} of {who}?", f"What is {who}'s favourite {what}?")), value)  # fmt: skip
    if kind == 2:
        who, value = name(rng), city(rng)
        return (
            f"{who} lives",
            f"{who} lives in {value}.",
            rng.choice((f"Where does {who} live?", f"In which city does {who} live?")),
            value,
        )
    if kind == 3:
        about, value = (
            f"{rng.choice([*COLOURS, *ADJECTIVES])} {rng.choice(PLACES)}",
            f"{made_up(rng)}-{made_up(rng)}",
        )
        return (about, f"The password for the {about} is {value}.",
                rng.choice((f"What is the password for the {about}?", f"Tell me the password for the {about}.")), value)  # fmt: skip
    if kind == 4:
        who, value = name(rng), str(rng.randint(2, 999))
        what = rng.choice(THINGS)
        return (f"{who} {what}", f"{who} keeps {value} {what} in a drawer.",
                rng.choice((f"How many {what} does {who} keep in a drawer?", f"How many {what} are in {who}'s drawer?")), value)  # fmt: skip
    if kind == 5:
        who, value = name(rng), rng.choice(JOBS)
        return (
            f"{who} works",
            f"{who} works as a {value}.",
            rng.choice((f"What does {who} work as?", f"What is the job of {who}?")),
            value,
        )
    about = made_up(rng, 2)
    value = rng.choice((code(rng), made_up(rng, 2), rng.choice(CITIES)))
    return (about, f"The secret word for {about} is {value}.",
            rng.choice((f"What is the secret word for {about}?", f"What is {about}'s secret word?")), value)  # fmt: skip


def _facts(rng: Random, count: int) -> list[_Fact]:
    """Facts about different things."""
    found: dict[str, _Fact] = {}
    while len(found) < count:
        one = fact(rng)
        found.setdefault(one[0], one)
    return list(found.values())


def long_text(rng: Random, tokens: int, questions: int = 1) -> Example:
    """A text of about ``tokens`` tokens with facts in it, then questions on some of them, one turn each.

    An examination asks for the first.
    """
    facts = _facts(rng, questions + rng.randint(0, 6))
    words = round(tokens / TOKENS_A_WORD)
    sentences: list[str] = []
    count = sum(len(sentence.split()) for _, sentence, _, _ in facts)
    while count < words:
        sentences.append(_filler(rng))
        count += len(sentences[-1].split())
    for _, sentence, _, _ in facts:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    asked = rng.sample(facts, questions)
    start = rng.choice(("Read this text.", "Here is a text.", "Remember this text."))
    messages: list[dict[str, Any]] = []
    for i, (_, sentence, question, value) in enumerate(asked):
        text = f"{start}\n\n{' '.join(sentences)}\n\n{question}" if i == 0 else question
        messages += [{"role": "user", "content": text}, turn(value + ".", f"The text says: {sentence}")]
    return Example(tuple(messages), asked[0][3], ask=1)


def earlier_turn(rng: Random) -> Example:
    """A fact told in an earlier turn, with other turns between."""
    facts = _facts(rng, rng.randint(1, 4))
    before: list[dict[str, Any]] = []
    for _, sentence, _, _ in facts:
        opening = rng.choice(("", "Please remember: ", "Note this: ", "For later: "))
        before += [
            {"role": "user", "content": opening + sentence},
            turn(rng.choice(("Noted.", "I will remember that."))),
        ]
    _, sentence, question, value = rng.choice(facts)
    return chat(question, value + ".", answer=value, reasoning=f"The user said: {sentence}", before=before)
