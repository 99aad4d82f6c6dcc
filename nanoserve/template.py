"""A checkpoint's chat template: found, checked at load, and run in transformers' immutable Jinja sandbox.

A template is the checkpoint's code, so it sees plain JSON values only. Jinja's loops cannot be cancelled; the
sandbox caps ``range`` at 100,000.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from nanoserve.errors import CheckpointError, RequestError
from nanoserve.files import read_text
from nanoserve.messages import remove_marker

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"

# All that expressions of a template raise: jinja2's own, then what Python's operators and methods raise.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def find_template(directory: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The template's source and the file it stands in: chat_template.jinja, else tokenizer_config.json.

    Args:
        directory: the checkpoint.
        config: the content of tokenizer_config.json.

    Raises:
        CheckpointError: the template is not text, or of several none is named "default".
    """
    if os.path.lexists(directory / TEMPLATE_FILE):
        return read_text(directory, TEMPLATE_FILE), TEMPLATE_FILE
    found: object = config.get("chat_template")
    if isinstance(found, list):
        found = _default_of(cast("list[object]", found))
    if found is None or isinstance(found, str):
        return found, CONFIG_FILE
    raise CheckpointError(CONFIG_FILE, "chat_template must be a string or a list of {name, template}")


def _default_of(entries: list[object]) -> object:
    for entry in entries:
        if isinstance(entry, Mapping):
            named = cast("Mapping[str, object]", entry)
            if named.get("name") == "default":
                return named.get("template")
    raise CheckpointError(CONFIG_FILE, 'chat_template is a list without an entry named "default": add one')


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant says, for training; here it only has to be read over."""

    tags = {"generation"}  # noqa: RUF012 (so it is declared in jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's own content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _inputs(template: str) -> frozenset[str]:
    """Variables that the template reads and that do not only come from itself, so that a caller may set them."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    tree = environment.parse(template)
    first: dict[str, str] = {}
    for name in _names(tree):
        first.setdefault(name.name, name.ctx)
    # jinja2 names some variables that blocks set and others read: those are written before they are read.
    found = jinja2.meta.find_undeclared_variables(tree)
    return frozenset(name for name in found if first.get(name) == "load")


def _names(node: jinja2.nodes.Node) -> Iterator[jinja2.nodes.Name]:
    """Every name, in the order of execution: what is assigned is computed before."""
    if isinstance(node, jinja2.nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, jinja2.nodes.Assign):
        children = [node.node, node.target]
    for child in children:
        yield from _names(child)


def check_template(template: str, file: str) -> frozenset[str]:
    """Compile the template.

    Returns:
        The variables that it reads, its switches among them.

    Raises:
        CheckpointError: a syntax error (names the file and the line), or what Python cannot compile.
    """
    try:
        _render(template, [], None, {})
        return _inputs(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(file, f"chat template, line {error.lineno}: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise CheckpointError(file, f"chat template cannot be compiled: {type(error).__name__}") from error


def run_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    marker: str,
) -> str:
    """Render one chat.

    Args:
        template: compiled before by `check_template`.
        messages: normalised and disarmed.
        tools: likewise.
        variables: everything else that the template may read.
        marker: kept out of error messages.

    Raises:
        RequestError: the template refuses the chat, or fails on it.
    """
    try:
        return _render(template, [messages], tools, variables)[0]
    except _TEMPLATE_FAILURES as error:
        reason = remove_marker(str(error), marker)[:200]
        if type(error) is not jinja2.TemplateError:  # raise_exception's own words need no class name
            reason = f"{type(error).__name__}: {reason}"
        message = f"messages do not fit this checkpoint's chat template: {reason}"
        raise RequestError(message, param="messages") from error


def _render(
    template: str,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template  # takes half a second

    rendered, _ = render_jinja_template(
        conversations=cast("Any", chats), tools=cast("Any", tools), chat_template=template, **variables
    )
    return cast("list[str]", rendered)
