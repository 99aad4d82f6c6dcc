"""What the doors of other interfaces share: they turn a body into a chat's, and its errors back. Pure functions.

`parse_chat` checks what they make, so that a chat's rules hold at every door. Here stand, in one place, the fields
that are let through without effect, because they change nothing of an answer.
"""

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

from nanoserve.errors import RequestError
from nanoserve.messages import check_unicode, strings
from nanoserve.protocol import Fields, refuse

EXTENSIONS = (
    *("seed", "min_p", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "stop_token_ids", "ignore_eos"),
)
"""Fields of the engine's own that every door takes, as a chat does."""

ANTHROPIC_HINTS = frozenset(
    {
        *("metadata", "service_tier", "speed", "user_profile_id", "workspace_id"),
        # Ask for news of a cache beside the answer, or mark what to cache.
        *("diagnostics", "cache_control"),
    }
)
ANTHROPIC_BLOCK_HINTS = frozenset(
    {
        "cache_control",
        # An answer's blocks come back with these: a signature that this server does not need, sources that are
        # no part of a prompt, and who made a call.
        *("signature", "citations", "caller"),
    }
)
ANTHROPIC_TOOL_HINTS = frozenset({"cache_control", "eager_input_streaming"})
RESPONSES_HINTS = frozenset(
    {
        *("metadata", "client_metadata", "user", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        "max_tool_calls",  # counts calls of the server's own tools, and there are none
    }
)
RESPONSES_ITEM_HINTS = frozenset(
    {
        # An answer's items come back with these. Encrypted reasoning is read where there is none in the open.
        *("id", "status", "phase", "annotations", "logprobs", "encrypted_content", "created_by"),
    }
)

Names = Sequence[tuple[str, str]]
"""A chat's names of fields, as regular expressions of a path's beginning, and a door's own."""


@contextmanager
def renaming(names: Names) -> Generator[None]:
    """Let errors name the fields as the door's client has spelt them.

    Raises:
        RequestError: as what is done inside, under the door's names.
    """
    try:
        yield
    except RequestError as error:
        if error.param is None:
            raise
        for pattern, name in names:
            if match := re.match(pattern + r"(?![^.\[])", error.param):
                new = match.expand(name)
                param = new + error.param[match.end() :]
                message = str(error)
                if message.startswith(match.group()):
                    message = new + message[match.end() :]
                raise RequestError(message, param=param, code=error.code, status=error.status) from error
        raise


def extensions(fields: Fields, *more: str) -> dict[str, Any]:
    """The engine's own fields, as they came."""
    found = {name: fields.take(name) for name in (*EXTENSIONS, *more)}
    return {name: value for name, value in found.items() if value is not None}


def given(**chat: Any) -> dict[str, Any]:
    """A chat's body without what was not sent."""
    return {name: value for name, value in chat.items() if value is not None}


def object_at(value: object, where: str) -> Fields:
    """An object's fields.

    Raises:
        RequestError: it is none, or holds text that is not valid Unicode.
    """
    if not isinstance(value, dict):
        refuse(where, value, "an object")
    table = cast("dict[str, Any]", value)
    for text in strings(table):
        check_unicode(text, where)
    return Fields(table, where)


def text_of(fields: Fields, name: str = "text") -> str:
    """A string that must be there.

    Raises:
        RequestError: it is not.
    """
    value = fields.string(name)
    if value is None:
        refuse(fields.path(name), None, "a string")
    return value


def one_system(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one of role system at most, at the beginning: templates have no place for others.

    Those at the beginning are put together. A later one, as Claude Code and Codex send them, speaks as the user,
    in tags that say what it is.
    """
    rest = list(messages)
    texts: list[str] = []
    while rest and rest[0]["role"] == "system":
        texts.append(rest.pop(0)["content"])
    late = [_reminder(message) if message["role"] == "system" else message for message in rest]
    return [{"role": "system", "content": "\n\n".join(texts)}, *late] if texts else late


def _reminder(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}


def function_tool(fields: Fields, schema: str, *more: str) -> dict[str, Any]:
    """A chat's tool of a flat declaration; the caller ends the fields.

    Args:
        fields: of the declaration.
        schema: the door's name of the parameters' schema.
        more: what else is shown to the model.
    """
    own = {name: fields.take(name) for name in ("name", "description", "strict", *more)}
    return {"type": "function", "function": given(**own, parameters=fields.take(schema))}
