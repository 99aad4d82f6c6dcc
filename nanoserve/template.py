"""A checkpoint's chat template: found, checked at load, and run in transformers' immutable Jinja sandbox.

A template is the checkpoint's code, so it sees plain JSON values only. Jinja's loops cannot be cancelled; the
sandbox caps ``range`` at 100,000.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2

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


def check_template(template: str, file: str) -> None:
    """Compile the template.

    Raises:
        CheckpointError: a syntax error (names the file and the line), or what Python cannot compile.
    """
    try:
        _render(template, [], None, {})
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
