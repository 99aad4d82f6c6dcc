r"""The tool calls of the released chat templates as a grammar, which `parsing.py` and `arguments.py` read back.

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Parameters come in any order and at most once, the required ones always. A string's VALUE is free text that holds
no tag of a call; other values are JSON, which llguidance holds to the parameter's schema, and in whose strings the
parser takes any tag for text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

from llguidance import regex_to_lark

from nanoserve.arguments import ENDS, argument
from nanoserve.grammar_schema import MAX_TEXT, Schema, clean_schema, refuse, resolve, with_options
from nanoserve.request import brief

MAX_PARAMETERS = 64
"""Of one tool: llguidance notes in 64 bits which of them an answer has given."""

_PARAM = "tools"
_END = r'"\n</parameter>\n"'
_FREE = r"/(?s:.*)/ & ~/(?s:.*)(<\/?tool_call>|<function=|<\/function>|<parameter=|<\/parameter>)(?s:.*)/"

_DAY = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_FORMATS = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": f"{_DAY}T{_CLOCK}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+",
    "uri": r"[a-z][a-z0-9+.-]*:[A-Za-z0-9._~\/?#@!$&'()*+,;=:%-]+",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
}
"""Each matches texts of its format, if not all of them."""


def tool_grammar(tools: Mapping[str, Mapping[str, Any]], several: bool, tags: tuple[str, str]) -> str:
    """The grammar of ``calls``, in llguidance's dialect of Lark.

    Args:
        tools: the JSON schemas of the parameters, by the tool's name; at least one.
        several: more than one call may come.
        tags: ``<tool_call>`` and ``</tool_call>``, as the grammar is to write them.

    Raises:
        RequestError: a schema has something that a call in this form cannot be held to.
    """
    if not tools:
        refuse("is empty: declare at least one tool", _PARAM)
    names = " | ".join(f"f{i}" for i in range(len(tools)))
    more = r'("\n" call)* ' if several else ""
    lines = [rf'calls: call {more}"\n"?', rf'call: {tags[0]} "\n" ({names}) "\n" {tags[1]}']
    size = 0
    for i, (name, schema) in enumerate(tools.items()):
        for line in _Tool(f"f{i}", name, clean_schema(schema, _PARAM)).lines():
            lines.append(line)
            size += len(line)
            if size > MAX_TEXT:  # at once: a definition is written anew for every parameter that needs it
                refuse(f"makes a grammar of more than {MAX_TEXT} characters: declare less", _PARAM)
    return "\n".join(lines)


class _Tool:
    """One tool's part of the grammar.

    Args:
        rule: the name of its rule; those of its parameters begin with it.
        name: of the function.
        root: the cleaned schema of its parameters.
    """

    def __init__(self, rule: str, name: str, root: Schema) -> None:
        self._rule, self._name, self._root = rule, name, root

    def lines(self) -> Iterator[str]:
        """The function's rule, then the one of its parameters, then those of their values."""
        if self._root.get("type", "object") != "object":
            self._refuse("parameters that are no object: give them the type object")
        allowed = ("type", "properties", "required", "additionalProperties", "$defs", "definitions")
        if unknown := next((key for key in self._root if key not in allowed), None):
            self._refuse(f"{unknown!r} beside its parameters: leave it out")
        required: list[str] = self._root.get("required", [])
        properties: Schema = {**dict.fromkeys(required, True), **self._root.get("properties", {})}
        keys = sorted(properties, key=lambda key: key not in required)
        if len(keys) > MAX_PARAMETERS:
            self._refuse(f"{len(keys)} parameters: at most {MAX_PARAMETERS} are supported")
        start = _quoted(f"<function={self._tagged(self._name)}>\n")
        if not keys:
            yield f'{self._rule}: {start} "</function>"'
            return
        # The required ones have the lowest bits: "all of them are there" is one condition.
        done = f" %if is_ones([0:{len(set(required))}])" if required else ""
        yield f"{self._rule}: {start} {self._rule}p::0x0"
        yield f'{self._rule}p::_: "</function>"{done}'
        values: list[str] = []
        for bit, key in enumerate(keys):
            is_text, value = self._value(key, properties[key])
            # Text and what ends it must be one terminal: two would not know where the first ends.
            rule = f"{self._rule}v{bit}".upper() if is_text else f"{self._rule}v{bit}"
            values.append(f"{rule}: ({value}) {_END}")
            tag = _quoted(f"<parameter={self._tagged(key)}>\n")
            yield f"    | {tag} {rule} {self._rule}p::set_bit({bit}) %if bit_clear({bit})"
        yield from values

    def _value(self, key: str, schema: Any) -> tuple[bool, str]:
        """(whether it is a terminal, the expression) of a parameter's value."""
        branches = self._branches(key, schema)
        if not any(map(_is_text, branches)):
            if '"$ref"' in json.dumps(schema):
                schema = {
                    **{key: self._root[key] for key in ("$defs", "definitions") if key in self._root},
                    **schema,
                }
            return False, f"%json {json.dumps(with_options(schema))}"
        kinds = [kind for branch in branches for kind in _kinds(branch)]
        parts: list[str] = []
        for branch in branches:
            if (values := _values(branch)) is not None:
                parts += self._literals(key, values, list(dict.fromkeys(kinds)))
            elif _is_text(branch):
                parts.append(self._text(key, branch))
            elif set(branch) == {"type"}:
                parts += {"null": ['"null"'], "boolean": ['"true"', '"false"']}.get(branch["type"], [])
            else:
                self._refuse(f"a parameter {brief(key)} of text, or else of a {branch['type']} with conditions")
        return True, " | ".join(parts)

    def _branches(self, key: str, schema: Any) -> list[Schema]:
        """The schemas of one type or of some values, one of which a value is to match."""
        found: list[Schema] = []
        todo, seen = [schema], set[int]()
        for node in todo:  # which grows meanwhile
            node = resolve(node, self._root)
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node is True:
                found.append({})
            elif (
                isinstance(node, dict) and node.get("type", "string") != "string" and isinstance(node["type"], str)
            ):
                found.append(cast("Schema", node))
            elif not isinstance(node, dict) or not set(node).isdisjoint(("$ref", "allOf")):
                self._refuse(f"a parameter {brief(key)} with a schema that cannot be followed: give it a type")
            elif union := {"anyOf", "oneOf"}.intersection(cast("Schema", node)):
                if len(cast("Schema", node)) > 1:
                    self._refuse(f"a parameter {brief(key)} with more than {sorted(union)[0]}: move it inside")
                todo += node[union.pop()]
            else:
                table = cast("Schema", node)
                kinds = table["type"] if isinstance(table.get("type"), list) else [table.get("type")]
                found += [{**table, "type": kind} if kind else table for kind in kinds]
        return found

    def _literals(self, key: str, values: Sequence[Any], kinds: Sequence[str]) -> list[str]:
        """The values as texts that are read back as what they are."""
        types = {"properties": {key: {"type": kinds}}}
        kept: list[str] = []
        for value in values:
            text = value if isinstance(value, str) else json.dumps(value)
            read = json.loads(f"{{{argument(types, key, text)}}}")[key]
            if read == value and type(read) is type(value) and not any(tag in text for tag in ENDS):
                kept.append(text)
        if not kept:
            self._refuse(f"a parameter {brief(key)} with values that no call can give: give it their type")
        return [_quoted(text) for text in kept]

    def _text(self, key: str, branch: Schema) -> str:
        """A string's terminal: free text within the schema's limits."""
        parts = [_FREE]
        if "minLength" in branch or "maxLength" in branch:
            parts.append(f"/(?s:.{{{branch.get('minLength', 0)},{branch.get('maxLength', '')}}})/")
        if "pattern" in branch:
            parts.append(_searched(branch["pattern"]))
        if "format" in branch:
            if branch["format"] not in _FORMATS:
                self._refuse(f"a parameter {brief(key)} of format {brief(branch['format'])}: leave it out")
            parts.append(f"/{_FORMATS[branch['format']]}/")
        return " & ".join(parts)

    def _tagged(self, name: str) -> str:
        """A name that can stand in a tag."""
        if not name or len(name) > 256 or not {"<", ">", "\n"}.isdisjoint(name):
            self._refuse(f"the name {brief(name)}, which cannot stand in a tag: use letters, digits and _")
        return name

    def _refuse(self, problem: str) -> NoReturn:
        refuse(f"has {problem} (in the tool {brief(self._name)})", _PARAM)


def _values(branch: Schema) -> list[Any] | None:
    """The values that a schema lists, if it does."""
    return [branch["const"]] if "const" in branch else branch.get("enum")


def _kinds(branch: Schema) -> list[str]:
    """The types by which `arguments.py` will read a value of this schema."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    if "type" in branch:
        return [branch["type"]]
    return [kinds.get(type(value), "null") for value in _values(branch) or ()]


def _is_text(branch: Schema) -> bool:
    """Whether a call gives a value of this schema as it stands, and not as JSON."""
    values = _values(branch)
    if "type" in branch:
        return branch["type"] == "string"
    return values is None or any(isinstance(value, str) for value in values)


def _searched(pattern: str) -> str:
    """A regular expression that is to be found in a text, as one that matches it whole."""
    inner = regex_to_lark(pattern, "dw")
    before, after = "(?s:.*)", "(?s:.*)"
    if inner.startswith("^"):
        inner, before = inner[1:], ""
    if inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2:
        inner, after = inner[:-1], ""
    return f"/{before}(?:{inner}){after}/"


def _quoted(text: str) -> str:
    return json.dumps(text)
