"""Calling one tool out of a list with typed arguments, and answering with its result."""

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from nanoserve.models.demo.examples import Example, turn
from nanoserve.models.demo.words import (
    ADJECTIVES,
    COLOURS,
    LANGUAGES,
    NOUNS,
    PLACES,
    THING,
    TOPICS,
    VERBS,
    city,
    clock,
    code,
    date,
    made_up,
    name,
)

_Make = Callable[[Random], Any]


def _int(low: int, high: int) -> tuple[str, _Make]:
    return "integer", lambda r: r.randint(low, high)


def _text(make: _Make) -> tuple[str, _Make]:
    return "string", make


def _phrase(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(PLACES)}"


def _enum(*options: str) -> tuple[str, _Make]:
    return "|".join(options), lambda r: r.choice(options)


_Tool = tuple[str, str, Mapping[str, tuple[str, _Make]], tuple[str, ...], Mapping[str, _Make]]
"""(name, description, parameters, requests, result). A request mentions the parameters that it gives."""

_TOOLS: tuple[_Tool, ...] = (
    ("get_weather", "Get the weather of a city", {"city": _text(city), "unit": _enum("celsius", "fahrenheit")},
     ("What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city} in {unit}, please.",
      "Tell me the temperature in {city} in {unit}.", "Is it warm in {city}?"),
     {"temperature": lambda r: r.randint(-10, 38), "sky": lambda r: r.choice(("sunny", "cloudy", "rainy", "windy"))}),
    ("get_time", "Get the current time of a city", {"city": _text(city)},
     ("What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?"), {"time": clock}),
    ("convert_currency", "Convert money from one currency to another",
     {"amount": ("number", lambda r: round(r.uniform(1, 900), 2)), "source": _enum("USD", "EUR", "GBP", "JPY", "CHF"), "target": _enum("USD", "EUR", "GBP", "JPY", "CHF")},
     ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?", "Change {amount} {source} into {target}."),
     {"result": lambda r: round(r.uniform(1, 900), 2)}),
    ("send_message", "Send a message to a person", {"to": _text(name), "text": _text(lambda r: f"{r.choice(('meet me at the', 'the key is in the', 'come to the'))} {r.choice(PLACES)}")},
     ('Send "{text}" to {to}.', 'Write {to} a message: {text}', "Tell {to} this: {text}", 'Message {to}: "{text}"'), {"status": lambda r: "sent"}),
    ("set_timer", "Start a timer", {"minutes": _int(1, 120), "label": _text(lambda r: r.choice(THING))},
     ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer called {label}.", "Wake me in {minutes} minutes.", "Timer of {minutes} minutes for the {label}, please."),
     {"status": lambda r: "started"}),
    ("search_books", "Search books in the library", {"query": _text(_phrase), "limit": _int(1, 20)},
     ("Find books about the {query}.", "Search {limit} books about the {query}.", "Are there books on the {query}?"), {"found": lambda r: r.randint(0, 40)}),
    ("book_table", "Book a table in a restaurant", {"restaurant": _text(lambda r: made_up(r, 2).capitalize()), "people": _int(1, 12), "time": _text(clock)},
     ("Book a table at {restaurant} for {people} people at {time}.", "I want to eat at {restaurant} with {people} people at {time}.", "Reserve a table for {people} at {restaurant}, {time}."),
     {"booking": code}),
    ("add_event", "Add an event to the calendar", {"title": _text(lambda r: f"{r.choice(ADJECTIVES)} {r.choice(NOUNS)}"), "date": _text(date), "all_day": ("boolean", lambda r: r.random() < 0.5)},
     ("Add {title} to my calendar on {date}.", "Put {title} into the calendar for {date}. All day: {all_day}.", "New event {title} on {date}, all day {all_day}."), {"event": code}),
    ("turn_light", "Switch a light on or off", {"room": _text(lambda r: r.choice(PLACES)), "on": ("boolean", lambda r: r.random() < 0.5)},
     ("Turn the light in the {room} {on:on|off}.", "Switch {on:on|off} the {room} light.", "The {room} light should be {on:on|off}."), {"status": lambda r: "done"}),
    ("translate", "Translate a text", {"text": _text(lambda r: f"the {r.choice(ADJECTIVES)} {r.choice(THING)}"), "language": _text(lambda r: r.choice(LANGUAGES))},
     ('Translate "{text}" into {language}.', 'How do you say "{text}" in {language}?', "Give me the {language} for {text}."), {"translation": lambda r: f"{made_up(r)} {made_up(r)}"}),
    ("get_stock_price", "Get the price of a stock", {"symbol": _text(lambda r: "".join(r.choice("ABCDEFGHKLMNPRST") for _ in range(r.randint(3, 4))))},
     ("What is the price of {symbol}?", "How much is a share of {symbol}?", "Stock price of {symbol}, please."), {"price": lambda r: round(r.uniform(1, 700), 2)}),
    ("add_numbers", "Add two numbers", {"a": _int(0, 9999), "b": _int(0, 9999)},
     ("Use the tool to add {a} and {b}.", "Add {a} and {b} with the tool.", "What is {a} plus {b}? Use the tool."), {"sum": lambda r: r.randint(0, 19999)}),
    ("paint", "Paint a thing in a colour", {"thing": _text(lambda r: r.choice(THING)), "colour": _text(lambda r: r.choice(COLOURS))},
     ("Paint the {thing} {colour}.", "Make the {thing} {colour}.", "I want a {colour} {thing}. Please paint it."), {"status": lambda r: "painted"}),
    ("find_route", "Find a way between two places", {"start": _text(city), "end": _text(city), "mode": _enum("car", "train", "bike")},
     ("How do I get from {start} to {end} by {mode}?", "Route from {start} to {end} by {mode}.", "Find the way from {start} to {end}."), {"km": lambda r: r.randint(3, 2000)}),
    ("play_song", "Play a song", {"title": _text(_phrase), "artist": _text(name)},
     ("Play {title} by {artist}.", "I want to hear {title}.", "Put on {title} by {artist}, please."), {"status": lambda r: "playing"}),
    ("track_parcel", "Look up where a parcel is", {"number": _text(code)},
     ("Where is my parcel {number}?", "Track parcel {number}.", "Has parcel {number} arrived?"), {"place": city}),
    ("set_temperature", "Set the temperature of a room", {"room": _text(lambda r: r.choice(PLACES)), "degrees": ("number", lambda r: r.randint(30, 60) / 2)},
     ("Set the {room} to {degrees} degrees.", "Make it {degrees} degrees in the {room}.", "Heat the {room} to {degrees} degrees."), {"status": lambda r: "set"}),
    ("create_list", "Create a list of things", {"name": _text(lambda r: r.choice(NOUNS)), "items": ("array", lambda r: r.sample(THING, r.randint(2, 4)))},
     ("Make a list called {name} with {items}.", "Create the list {name}: {items}.", "I need a {name} list with {items}."), {"list": code}),
)  # fmt: skip


def _schema(kind: str) -> dict[str, Any]:
    if "|" in kind:
        return {"type": "string", "enum": kind.split("|")}
    return {"type": "array", "items": {"type": "string"}} if kind == "array" else {"type": kind}


def _declare(rng: Random, tool: _Tool, required: list[str]) -> dict[str, Any]:
    tool_name, description, parameters, _, _ = tool
    properties: dict[str, Any] = {}
    for key, (kind, _) in parameters.items():
        properties[key] = _schema(kind)
        if rng.random() < 0.5:
            properties[key]["description"] = f"The {key.replace('_', ' ')}"
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": tool_name, "description": description, "parameters": schema}}


_CARRIERS: tuple[str, ...] = (
    "Please {verb} the {noun}{with}.", "{Verb} the {noun}{with}.", "Can you {verb} a {noun}{with}?", "I want to {verb} a {noun}{with}.",
    "{Verb} {noun}{with}", "Could you {verb} my {noun}{with}?", "It is time to {verb} the {noun}{with}.",
)  # fmt: skip


def _made_up_tool(rng: Random) -> _Tool:
    """A tool of any verb and noun, with requests that name every parameter in words."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    if rng.random() < 0.15:
        noun = made_up(rng, 2)
    kinds: tuple[tuple[str, _Make], ...] = (
        _int(0, 5000), _text(lambda r: made_up(r, 2)), _text(name), _text(code), _text(city), _text(date), _text(_phrase),
        ("number", lambda r: round(r.uniform(0, 200), 1)), ("boolean", lambda r: r.random() < 0.5),
        _enum(*rng.sample(ADJECTIVES, 3)),
    )  # fmt: skip
    keys = rng.sample(TOPICS, rng.randint(1, 4))
    parameters = {key: rng.choice(kinds) for key in keys}
    link = rng.choice(("{k} {{{k}}}", "{k}: {{{k}}}", "{k} = {{{k}}}", "the {k} {{{k}}}", "{{{k}}} as {k}"))
    parts = [link.format(k=key) for key in keys]
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    with_ = rng.choice((" with ", ": ", ", ", " using ")) + joined
    request = rng.choice(_CARRIERS).format(verb=verb, Verb=verb.capitalize(), noun=noun, **{"with": with_})
    style = rng.choice((f"{verb}_{noun}", f"{verb}_{noun}", f"{noun}_{verb}", f"{verb}{noun.capitalize()}"))
    description = rng.choice(
        (f"{verb.capitalize()} a {noun}", f"{verb.capitalize()} the {noun}", f"Used to {verb} a {noun}")
    )
    result: dict[str, _Make] = rng.choice(
        ({"status": lambda r: "done"}, {"id": code}, {"result": lambda r: r.randint(0, 900)})
    )
    return style, description, parameters, (request,), result


def _shown(value: Any, hint: str) -> str:
    if isinstance(value, bool):
        yes, no = hint.split("|") if hint else ("yes", "no")
        return yes if value else no
    if isinstance(value, list):
        return f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value)


def _fill(request: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The request with its values, and those that it mentions, in the tool's order."""
    given: dict[str, Any] = {}
    for key, value in values.items():
        start = request.find("{" + key)
        while start >= 0:
            end = request.index("}", start)
            if request[start + 1 + len(key)] in ":}":
                hint = request[start + 2 + len(key) : end] if request[start + 1 + len(key)] == ":" else ""
                request = request[:start] + _shown(value, hint) + request[end + 1 :]
                given[key] = value
            else:
                start = end
            start = request.find("{" + key, start if start > 0 else 0)
    return request, {key: given[key] for key in values if key in given}


def example(rng: Random) -> Example:
    """A list of tools, then one to three rounds of a request, the call, its result and an answer."""
    pool = [rng.choice(_TOOLS) if rng.random() < 0.5 else _made_up_tool(rng) for _ in range(rng.randint(1, 5))]
    tools = list({tool[0]: tool for tool in pool}.values())
    declared = tuple(_declare(rng, tool, _always_given(tool)) for tool in tools)
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    answer: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        answer = _round(rng, rng.choice(tools), messages)
    return Example(tuple(messages), answer, declared, ask=len(messages) - 3)


def _always_given(tool: _Tool) -> list[str]:
    """The parameters that every request mentions."""
    return [key for key in tool[2] if all("{" + key + "}" in r or "{" + key + ":" in r for r in tool[3])]


_SHORT = {"done", "sent", "started", "painted", "playing", "set"}


def _round(rng: Random, tool: _Tool, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Add a request, its call, the result and the answer; the call."""
    values = {key: make(rng) for key, (_, make) in tool[2].items()}
    text, arguments = _fill(rng.choice(tool[3]), values)
    if rng.random() < 0.15:
        text = rng.choice(("Hi! ", "Hello, ", "Please help me. ", "One thing: ")) + text
    call = {"type": "function", "function": {"name": tool[0], "arguments": arguments}}
    result = {key: make(rng) for key, make in tool[4].items()}
    said = ", ".join(f"{key} is {value}" for key, value in result.items())
    final = "Done." if set(result.values()) <= _SHORT else f"The {said}."
    messages += [
        {"role": "user", "content": text},
        {**turn("", f"I call {tool[0]}."), "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
        turn(final, "The result is here."),
    ]
    return {"name": tool[0], "arguments": arguments}
