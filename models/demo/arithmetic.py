"""Word problems of two to four steps: every story is a chain of sums that the reasoning writes out one by one."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

from nanoserve.models.demo.examples import Example, chat
from nanoserve.models.demo.words import THING, THINGS, made_up, name, names

_MAX = 1500
"""Numbers stay below: a small model's sums are exact there."""


class _Story:
    """Sentences, and the sums behind them; a sum out of range marks the story as useless."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.sentences: list[str] = []
        self.sums: list[str] = []
        self.fine = True

    def say(self, *variants: str) -> None:
        self.sentences.append(self.rng.choice(variants))

    def sum(self, label: str, left: int, sign: str, right: int) -> int:
        """Note one step; its result."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[sign]
        exact = sign != "/" or (right > 0 and left % right == 0)
        self.fine = self.fine and exact and 0 <= result <= _MAX and 0 <= left <= _MAX
        self.sums.append(f"{label}: {left} {sign} {right} = {result}")
        return result


def _thing(rng: Random) -> str:
    return rng.choice(THINGS) if rng.random() < 0.8 else made_up(rng, 2) + "s"


def _running_total(s: _Story, steps: int) -> tuple[int, str]:
    rng, who, what = s.rng, name(s.rng), _thing(s.rng)
    total = rng.randint(3, 400) if rng.random() < 0.5 else rng.randint(3, 60)
    s.say(f"{who} has {total} {what}.", f"{who} starts with {total} {what}.", f"There are {total} {what} in {who}'s bag.",
          f"{who} owns {total} {what}.", f"In the morning {who} has {total} {what}.")  # fmt: skip
    while len(s.sums) < steps:
        other, room = name(rng), steps - len(s.sums)
        kind = rng.choice(("more", "more", "less", "less", "times", "share", "packs", "half"))
        if kind == "more":
            k = rng.randint(2, 300) if rng.random() < 0.5 else rng.randint(2, 40)
            s.say(f"{who} buys {k} more.", f"{other} gives {who} {k} more {what}.", f"Then {who} finds {k} {what}.",
                  f"Later {who} gets another {k} {what}.", f"{who} receives {k} {what} from {other}.",
                  f"{who} picks up {k} more {what}.", f"Then {who} adds {k} {what}.")  # fmt: skip
            total = s.sum("more", total, "+", k)
        elif kind == "less" and total > 3:
            k = rng.randint(1, total - 1)
            s.say(f"{who} gives {k} {what} to {other}.", f"{who} loses {k} of them.", f"Then {who} sells {k} {what}.",
                  f"{k} of the {what} get lost.", f"{who} gives away {k}.", f"{other} takes {k} {what}.",
                  f"{who} uses {k} {what}.", f"Then {k} {what} break.")  # fmt: skip
            total = s.sum("fewer", total, "-", k)
        elif kind == "times" and total < 130:
            k, word = rng.choice(((2, "doubles"), (2, "doubles"), (3, "triples")))
            s.say(f"Then {who} {word} the number of {what}.", f"After that the number of {what} {word}.")
            total = s.sum(word, total, "*", k)
        elif kind == "half" and total % 2 == 0 and total > 3:
            s.say(f"{who} gives half of the {what} to {other}.", f"Half of the {what} get lost.",
                  f"Then {who} sells half of them.")  # fmt: skip
            total = s.sum("half", total, "/", 2)
        elif kind == "share":
            fits = [k for k in range(2, 13) if total % k == 0 and total // k <= 99 and total > k]
            if fits:
                k = rng.choice(fits)
                s.say(f"{who} puts the {what} into {k} equal groups and keeps one group.",
                      f"{who} shares the {what} equally among {k} friends, and one friend counts what he got.",
                      f"The {what} are split equally into {k} bags. Take one bag.")  # fmt: skip
                total = s.sum("each", total, "/", k)
        elif kind == "packs" and room >= 2:
            b, k = rng.randint(2, 12), rng.randint(2, 30)
            s.say(f"{who} buys {b} boxes with {k} {what} each.", f"Then {who} gets {b} packs of {k} {what}.",
                  f"{other} brings {b} bags of {k} {what} each.")  # fmt: skip
            total = s.sum("more", total, "+", s.sum("packs", b, "*", k))
    return total, s.rng.choice((f"How many {what} does {who} have now?", f"How many {what} are left?",
                                f"How many {what} are there at the end?", f"How many {what} does {who} have in the end?"))  # fmt: skip


def _shopping(s: _Story, steps: int) -> tuple[int, str]:
    rng, who = s.rng, name(s.rng)
    first, second = rng.sample(range(len(THINGS)), 2)
    a, p, b, q = rng.randint(2, 12), rng.randint(2, 40), rng.randint(2, 12), rng.randint(2, 40)
    s.say(f"{who} buys {a} {THINGS[first]} for {p} dollars each.", f"{who} buys {a} {THINGS[first]} at {p} dollars a {THING[first]}.",
          f"A {THING[first]} costs {p} dollars, and {who} buys {a} {THINGS[first]}.",
          f"In a shop {who} takes {a} {THINGS[first]} that cost {p} dollars each.")  # fmt: skip
    total = s.sum(THINGS[first], a, "*", p)
    if steps >= 3:
        s.say(f"{who} also buys {b} {THINGS[second]} for {q} dollars each.",
              f"Then come {b} {THINGS[second]} at {q} dollars each.", f"{b} {THINGS[second]} for {q} dollars each are added.")  # fmt: skip
        total = s.sum("together", total, "+", s.sum(THINGS[second], b, "*", q))
    if steps in (2, 4):
        if rng.random() < 0.6:
            paid = total + rng.randint(1, 200)
            s.say(f"{who} pays with {paid} dollars.", f"{who} gives the seller {paid} dollars.")
            return s.sum("change", paid, "-", total), rng.choice(
                (f"How much change does {who} get?", "How many dollars come back?")
            )
        off = rng.randint(1, max(1, min(total - 1, 60)))
        s.say(f"A coupon takes {off} dollars off.", f"There is a discount of {off} dollars.")
        total = s.sum("after discount", total, "-", off)
    return total, rng.choice(
        (f"How much does {who} pay?", "How many dollars is that in all?", f"What does {who} pay in total?")
    )


def _rate(s: _Story, steps: int) -> tuple[int, str]:
    rng, who, what = s.rng, name(s.rng), _thing(s.rng)
    r, h = rng.randint(2, 40), rng.randint(2, 9)
    s.say(
        f"A machine makes {r} {what} an hour.",
        f"{who} makes {r} {what} every hour.",
        f"Every hour {who} packs {r} {what}.",
    )
    s.say(f"It runs {h} hours a day.", f"The work goes on for {h} hours a day.", f"A working day has {h} hours.")
    total = s.sum("a day", r, "*", h)
    if steps >= 3:
        d = rng.randint(2, 7)
        s.say(f"This goes on for {d} days.", f"That is done on {d} days.")
        total = s.sum("all days", total, "*", d)
    if steps in (2, 4):
        k = rng.randint(1, max(1, total - 1))
        if rng.random() < 0.5:
            s.say(f"{k} of the {what} are broken and thrown away.", f"{k} {what} are sold.")
            total = s.sum("fewer", total, "-", k)
        else:
            k = rng.randint(1, 300)
            s.say(f"There were {k} {what} in stock before.", f"{k} {what} had been made before.")
            total = s.sum("more", total, "+", k)
    return total, rng.choice(
        (f"How many {what} are there then?", f"How many {what} is that?", f"How many {what} are there at the end?")
    )


def _compare(s: _Story, steps: int) -> tuple[int, str]:
    rng, what = s.rng, _thing(s.rng)
    people = names(rng, steps)
    values = [rng.randint(2, 99)]
    s.say(f"{people[0]} has {values[0]} {what}.", f"{people[0]} collected {values[0]} {what}.")
    for before, who in pairwise(people):
        kind = rng.choice(("times", "more", "fewer"))
        if kind == "times" and values[-1] < 100:
            k, word = rng.choice(((2, "twice"), (3, "three times"), (4, "four times"), (5, "five times")))
            s.say(f"{who} has {word} as many as {before}.", f"{who} has {word} as many {what} as {before}.")
            values.append(s.sum(who, values[-1], "*", k))
        elif kind == "fewer" and values[-1] > 2:
            k = rng.randint(1, values[-1] - 1)
            s.say(f"{who} has {k} fewer than {before}.", f"{who} has {k} {what} less than {before}.")
            values.append(s.sum(who, values[-1], "-", k))
        else:
            k = rng.randint(1, 80)
            s.say(f"{who} has {k} more than {before}.", f"{who} has {k} more {what} than {before}.")
            values.append(s.sum(who, values[-1], "+", k))
    if steps == 2:
        if rng.random() < 0.7 or values[0] == values[1]:
            return s.sum("together", values[0], "+", values[1]), f"How many {what} do they have together?"
        return s.sum(
            "difference", max(values), "-", min(values)
        ), f"How many more {what} does one have than the other?"
    first, last = values[0], values[-1]
    return s.sum("together", first, "+", last), f"How many {what} do {people[0]} and {people[-1]} have together?"


def _groups(s: _Story, steps: int) -> tuple[int, str]:
    rng, what = s.rng, _thing(s.rng)
    place, box = rng.choice(
        (("school", "bus"), ("shop", "box"), ("farm", "crate"), ("library", "shelf"), ("factory", "pallet"))
    )
    k = rng.randint(2, 12)
    if steps == 2:
        n, more = k * rng.randint(2, 60), rng.randint(1, 40)
        s.say(f"A {place} has {n - more} {what} and gets {more} more.",
              f"There are {n - more} {what} in the {place}, and {more} more arrive.")  # fmt: skip
        total = s.sum("all", n - more, "+", more)
    else:
        a, each = rng.randint(2, 12), rng.randint(2, 99)
        s.say(f"A {place} has {a} rooms with {each} {what} in each.",
              f"There are {a} rows of {each} {what} in the {place}.")  # fmt: skip
        total = s.sum("all", a, "*", each)
    if steps == 4:
        gone = total - k * rng.randint(1, max(1, total // k))
        s.say(f"{gone} {what} are taken away.", f"Of these {gone} are sold.")
        total = s.sum("left", total, "-", gone)
    s.say(f"Each {box} holds {k} {what}.", f"They are packed {k} to a {box}.", f"A {box} takes {k} {what}.")
    total = s.sum("loads", total, "/", k)
    if steps == 2:
        return total, rng.choice((f"How often must a {box} be filled?", f"How many times is a {box} filled?"))
    price = rng.randint(2, 9)
    s.say(f"Filling a {box} costs {price} dollars.", f"Each full {box} costs {price} dollars.")
    cost = s.sum("cost", total, "*", price)
    return cost, rng.choice(("How many dollars does it cost?", "What is the cost in dollars?"))


_FAMILIES: tuple[Callable[[_Story, int], tuple[int, str]], ...] = (
    _running_total, _running_total, _shopping, _rate, _compare, _groups
)  # fmt: skip


def example(rng: Random) -> Example:
    """A word problem of two to four steps."""
    while True:
        story = _Story(rng)
        steps = rng.randint(2, 4)
        answer, question = rng.choice(_FAMILIES)(story, steps)
        if story.fine and 2 <= len(story.sums) <= 4:
            break
    text = " ".join([*story.sentences, question])
    return chat(text, f"The answer is {answer}.", reasoning="\n".join(story.sums), answer=answer)


def plain_sum(rng: Random) -> Example:
    """A sum as one may type it, such as "What is 12 + 30?", with one sign or two."""
    story = _Story(rng)
    while True:
        story.sums, story.fine = [], True
        sign = rng.choice("++--*/")
        left, right = rng.randint(0, 600), rng.randint(1, 600)
        if sign == "*":
            left, right = rng.randint(0, 99), rng.randint(1, 12)
        elif sign == "/":
            right = rng.randint(1, 12)
            left = right * rng.randint(0, 99)
        total = story.sum("sum", left, sign, right)
        shown = f"{left} {sign} {right}"
        if sign in "+-" and rng.random() < 0.3:
            third = rng.randint(1, 200)
            more = rng.choice("+-")
            total, shown = story.sum("sum", total, more, third), f"{shown} {more} {third}"
        if story.fine:
            break
    words = {"*": ("times", "x"), "/": ("divided by",), "+": ("plus",), "-": ("minus",)}
    if len(story.sums) == 1 and rng.random() < 0.4:
        shown = shown.replace(sign, rng.choice(words[sign]))
    asks = (
        "What is {}?",
        "{}",
        "{} =",
        "Calculate {}.",
        "How much is {}?",
        "what is {}",
        "Can you work out {}?",
        "{}?",
    )
    text = rng.choice(asks).format(shown)
    return chat(text, f"The answer is {total}.", reasoning="\n".join(story.sums), answer=total)
