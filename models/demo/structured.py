"""Answering as JSON for a given schema, from a text that holds the values."""

import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from nanoserve.models.demo.examples import Example, chat
from nanoserve.models.demo.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    HOBBIES,
    JOBS,
    LANGUAGES,
    MONTHS,
    PLACES,
    THING,
    TOPICS,
    city,
    clock,
    code,
    date,
    made_up,
    name,
)

_Value = tuple[Any, Mapping[str, Any]]
_String, _Integer, _Number, _Boolean = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


def _some(rng: Random, words: Sequence[str]) -> _Value:
    return rng.sample(words, rng.randint(1, 3)), {"type": "array", "items": {"type": "string"}}


def _listed(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _choice(rng: Random, words: Sequence[str]) -> _Value:
    options = rng.sample(words, rng.randint(2, 4))
    return rng.choice(options), {"type": "string", "enum": options}


_Field = tuple[str, Callable[[Random], _Value], tuple[str, ...]]
"""(names, separated by bars, value, sentences); a sentence for True and one for False when it is a boolean."""

_PERSON: tuple[_Field, ...] = (
    ("age|years", lambda r: (r.randint(1, 99), _Integer), ("{who} is {v} years old.", "{who} turned {v} this year.", "At {v}, {who} is full of plans.")),
    ("city|town|home", lambda r: (city(r), _String), ("{who} lives in {v}.", "{v} is where {who} lives.", "{who} has a flat in {v}.")),
    ("job|profession|work", lambda r: (r.choice(JOBS), _String), ("{who} works as a {v}.", "{who} is a {v}.")),
    ("hobbies|interests|likes", lambda r: _some(r, HOBBIES), ("{who} likes {v}.", "In the evening {who} enjoys {v}.", "{who}'s hobbies are {v}.")),
    ("languages|speaks", lambda r: _some(r, LANGUAGES), ("{who} speaks {v}.", "{who} has learnt {v}.")),
    ("height|height_m", lambda r: (round(r.uniform(1.2, 2.1), 2), _Number), ("{who} is {v} metres tall.",)),
    ("married|is_married", lambda r: (r.random() < 0.5, _Boolean), ("{who} is married.", "{who} is not married.")),
    ("student|is_student", lambda r: (r.random() < 0.5, _Boolean), ("{who} is a student.", "{who} is not a student.")),
    ("children|kids", lambda r: (r.randint(1, 6), _Integer), ("{who} has {v} children.", "There are {v} children in {who}'s family.")),
    ("birthday|born", lambda r: (date(r), _String), ("{who} was born on {v}.", "{who}'s birthday is {v}.")),
    ("pet|animal", lambda r: (r.choice(ANIMALS), _String), ("{who} has a {v} as a pet.", "{who} keeps a {v}.")),
    ("food|favourite_food", lambda r: (r.choice(FOODS), _String), ("{who}'s favourite food is {v}.", "{who} eats {v} every day.")),
)  # fmt: skip
_PRODUCT: tuple[_Field, ...] = (
    ("price|cost", lambda r: (round(r.uniform(1, 300), 2), _Number), ("The {who} costs {v} dollars.", "Its price is {v} dollars.")),
    ("stock|quantity|count", lambda r: (r.randint(0, 500), _Integer), ("There are {v} of them in stock.", "{v} are left in the store.")),
    ("colour|color", lambda r: _choice(r, COLOURS), ("It is {v}.", "The {who} comes in {v}.")),
    ("available|in_stock", lambda r: (r.random() < 0.5, _Boolean), ("It is available now.", "It is not available now.")),
    ("tags|labels", lambda r: _some(r, ADJECTIVES), ("Its tags are {v}.", "It is tagged {v}.")),
    ("code|sku|id", lambda r: (code(r), _String), ("The item number is {v}.", "It has the code {v}.")),
    ("weight|weight_kg", lambda r: (round(r.uniform(0.1, 40), 1), _Number), ("It weighs {v} kilograms.",)),
    ("maker|brand", lambda r: (made_up(r, 2).capitalize(), _String), ("It is made by {v}.", "The maker is {v}.")),
    ("rating|stars", lambda r: (r.randint(1, 5), _Integer), ("Buyers give it {v} stars.", "It is rated {v} out of 5.")),
)  # fmt: skip
_EVENT: tuple[_Field, ...] = (
    ("date|day", lambda r: (date(r), _String), ("The {who} is on {v}.", "It takes place on {v}.")),
    ("time|start", lambda r: (clock(r), _String), ("It starts at {v}.", "Doors open at {v}.")),
    ("place|location|venue", lambda r: (f"{r.choice(ADJECTIVES)} {r.choice(PLACES)}", _String), ("It is held in the {v}.", "The place is the {v}.")),
    ("city|town", lambda r: (city(r), _String), ("It happens in {v}.", "The {who} comes to {v}.")),
    ("guests|people|seats", lambda r: (r.randint(2, 900), _Integer), ("{v} people are invited.", "{v} guests will come.")),
    ("online|is_online", lambda r: (r.random() < 0.5, _Boolean), ("It is online.", "It is not online.")),
    ("speakers|hosts", lambda r: ([name(r) for _ in range(r.randint(1, 3))], {"type": "array", "items": {"type": "string"}}), ("The speakers are {v}.", "{v} will speak.")),
    ("month", lambda r: _choice(r, MONTHS), ("It comes back every {v}.",)),
    ("fee|ticket_price", lambda r: (r.randint(1, 120), _Integer), ("A ticket is {v} dollars.", "The fee is {v} dollars.")),
)  # fmt: skip
_SUBJECTS: tuple[tuple[str, Callable[[Random], str], str, tuple[_Field, ...]], ...] = (
    ("name|person|full_name", name, "This is about {who}.", _PERSON),
    ("product|item|title", lambda r: f"{r.choice(ADJECTIVES)} {r.choice(THING)}", "We sell a {who}.", _PRODUCT),
    ("event|title|name", lambda r: f"{made_up(r, 2).capitalize()} {r.choice(('meeting', 'concert', 'festival', 'lecture', 'dinner'))}",
     "The {who} is coming.", _EVENT),
)  # fmt: skip
_ASKS = (
    "Answer as JSON for this schema: {schema}",
    "Give the answer as JSON with this schema: {schema}",
    "Reply with JSON only. Schema: {schema}",
    "Write the data as a JSON object for the schema {schema}",
    "Extract the data. Use this JSON schema: {schema}",
)


def _made_up_field(rng: Random) -> tuple[str, Any, Mapping[str, Any], str]:
    """A field that no list holds, said plainly."""
    key = rng.choice(TOPICS) if rng.random() < 0.6 else made_up(rng, 2)
    value, kind = rng.choice(
        (
            (rng.randint(0, 2000), _Integer),
            (made_up(rng, 2), _String),
            (round(rng.uniform(0, 100), 1), _Number),
            (f"{made_up(rng)} {made_up(rng)}", _String),
        )
    )
    return (
        key,
        value,
        kind,
        rng.choice(("The {k} is {v}.", "Its {k} is {v}.", "As {k} we have {v}.")).format(k=key, v=value),
    )


def _said(rng: Random, field: _Field, who: str) -> tuple[str, Any, Mapping[str, Any], str]:
    keys, make, sentences = field
    value, kind = make(rng)
    if kind["type"] == "boolean":
        sentence = sentences[0 if value else 1]
    else:
        sentence = rng.choice(sentences)
    shown = _listed(value) if isinstance(value, list) else value
    return rng.choice(keys.split("|")), value, kind, sentence.format(who=who, v=shown)


def example(rng: Random) -> Example:
    """A text, a schema, and the JSON object."""
    keys, make, opening, fields = rng.choice(_SUBJECTS)
    who = make(rng)
    rows = [(rng.choice(keys.split("|")), who, _String, opening.format(who=who))]
    rows += [_said(rng, field, who) for field in rng.sample(fields, rng.randint(1, 4))]
    rows += [_made_up_field(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    rows = list({row[0]: row for row in rows}.values())
    text = " ".join([rows[0][3], *rng.sample([row[3] for row in rows[1:]], len(rows) - 1)])
    unasked = len(rows) > 2 and rng.random() < 0.3
    wanted = rng.sample(rows, len(rows) - 1 if unasked else len(rows))
    if rng.random() < 0.5:
        wanted.sort(key=rows.index)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: dict(kind) for key, _, kind, _ in wanted},
        "required": [key for key, _, _, _ in wanted],
    }
    if rng.random() < 0.3:
        schema["additionalProperties"] = False
    data = {key: value for key, value, _, _ in wanted}
    ask = rng.choice(_ASKS).format(schema=json.dumps(schema))
    reasoning = f"The fields are {', '.join(data)}."
    content = json.dumps(data, ensure_ascii=False)
    if rng.random() < 0.3:
        return chat(text, content, answer=data, reasoning=reasoning, system=ask)
    question = f"{text}\n\n{ask}" if rng.random() < 0.7 else f"{ask}\n\n{text}"
    return chat(question, content, answer=data, reasoning=reasoning)
