"""Text and chats to token ids, and token ids to text. Byte-level BPE only; never imports torch."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import tokenizers

from nanoserve.errors import CheckpointError, RequestError, UnsupportedModel
from nanoserve.files import read_optional
from nanoserve.messages import (
    LIVE_TEXTS,
    ControlTexts,
    check_template_kwargs,
    check_unicode,
    choose_marker,
    map_strings,
    normalize_messages,
    normalize_tools,
    remove_marker,
    strings,
    switches_of,
)
from nanoserve.template import CONFIG_FILE, TEMPLATE_FILE, check_template, find_template, run_template

FILE = "tokenizer.json"
_MAP_FILE = "special_tokens_map.json"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """One checkpoint's vocabulary and chat template. Safe to share between threads.

    Control tokens are the vocabulary's added tokens, such as ``<|im_start|>``. The special ones are hidden in
    text, except `messages.LIVE_TEXTS`, which the parser of an answer needs.

    Args:
        spec: the content of tokenizer.json.
        template: the chat template's source, if there is one.
        template_file: where the template stands, for messages.
        special_tokens: variables of the template, such as ``eos_token``.

    Attributes:
        vocab_size: largest token id + 1.
        has_chat_template: chats can be encoded.
        switches: names of the template's variables that a request may set, such as ``enable_thinking``.

    Raises:
        CheckpointError: the vocabulary or the template is broken, or of a kind that is not supported.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        template: str | None = None,
        *,
        template_file: str = TEMPLATE_FILE,
        special_tokens: Mapping[str, str] = _NO_KWARGS,
    ) -> None:
        _require_byte_level(spec)
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._full = _build({**spec, "truncation": None, "padding": None})
        added = self._full.get_added_tokens_decoder()
        for token in added.values():
            _require_usable(token)
        self._controls = {token.content: id for id, token in added.items()}
        self._hidden = {i for i, t in added.items() if t.special and t.content not in LIVE_TEXTS}
        self._plain = _build(_without_controls(spec, set(added)))
        self._control_texts = ControlTexts(self._controls)
        self._split = _control_pattern(list(added.values()))
        texts = {id: text for text, id in self._full.get_vocab(with_added_tokens=True).items()}
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._bytes = {
            id: text.encode() if id in added else _symbol_bytes(text, byte_of) for id, text in texts.items()
        }
        self.vocab_size = max(texts, default=-1) + 1
        self.has_chat_template = template is not None
        variables = frozenset[str]() if template is None else check_template(template, template_file)
        self.switches = switches_of(variables, self._special_tokens)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer | None":
        """Read a checkpoint's tokenizer files; None when there is no tokenizer.json.

        Raises:
            CheckpointError: a file is present and broken, or of a kind that is not supported.
        """
        spec = read_optional(directory, FILE)
        if spec is None:
            return None
        config = read_optional(directory, CONFIG_FILE) or {}
        names = read_optional(directory, _MAP_FILE) or {}
        template, file = find_template(directory, config)
        special = _special_tokens({**names, **config})
        return cls(spec, template, template_file=file, special_tokens=special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt; control tokens written in it count as such.

        Raises:
            RequestError: the text holds a lone surrogate.
        """
        check_unicode(text, "prompt")
        return _ids(self._full, text, add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    ) -> list[int]:
        """Token ids of a chat. Control ids stand only where the template, or an assistant's tags, put them.

        Args:
            messages: OpenAI messages.
            tools: OpenAI tools.
            add_generation_prompt: end with the opening of the assistant's turn.
            template_kwargs: the template's own switches, such as ``enable_thinking``; JSON scalars.

        Raises:
            RequestError: a message is malformed, the template refuses the chat, or there is no template.
        """
        text, marker = self._render(messages, tools, add_generation_prompt, template_kwargs)
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._encode_plain(remove_marker(text[at : match.start()], marker))
            ids.append(self._controls[match.group().strip()])
            at = match.end()
        return ids + self._encode_plain(remove_marker(text[at:], marker))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] = _NO_KWARGS,
    ) -> str:
        """The text that `encode_chat` encodes, to look at: encoding it again would revive typed controls.

        Raises:
            RequestError: as `encode_chat`.
        """
        text, marker = self._render(messages, tools, add_generation_prompt, template_kwargs)
        return remove_marker(text, marker)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self._visible_bytes if skip_special else self.token_bytes, ids)).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of one token, perhaps a part of a character.

        Empty for an id that the vocabulary lacks: embeddings are often padded beyond it.
        """
        return self._bytes.get(id, b"")

    @property
    def controls(self) -> Mapping[str, int]:
        """The control tokens: their text, and their id."""
        return MappingProxyType(self._controls)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, in which nothing is a control token."""
        return self._encode_plain(text)

    def is_hidden(self, id: int) -> bool:
        """Whether the token is a control token that never shows in text."""
        return id in self._hidden

    def token_text(self, id: int) -> str:
        """The token as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def detokenizer(self) -> "Detokenizer":
        """A fresh incremental decoder."""
        return Detokenizer(self._visible_bytes)

    def _visible_bytes(self, id: int) -> bytes:
        return b"" if id in self._hidden else self.token_bytes(id)

    def _encode_plain(self, text: str) -> list[int]:
        return _ids(self._plain, text, False) if text else []

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The rendered chat with markers in it, and the marker."""
        if self._template is None:
            raise RequestError(
                "this checkpoint has no chat template: use /v1/completions with a prompt", param="messages"
            )
        try:
            check_template_kwargs(template_kwargs, self.switches)
            normal = normalize_messages(messages)
            plain_tools = normalize_tools(tools)
            texts = _checked_texts(normal, plain_tools, template_kwargs)
            marker = choose_marker([*texts, self._template, *self._controls])
            controls = self._control_texts
            disarmed = [controls.disarm_message(message, marker) for message in normal]
            safe_tools = map_strings(plain_tools, lambda text: controls.disarm(text, marker))
            safe_kwargs = map_strings(template_kwargs, lambda text: controls.mark_edges(text, marker))
        except RecursionError as error:
            raise RequestError("messages or tools are nested too deeply", param="messages") from error
        variables = {**self._special_tokens, **safe_kwargs, "add_generation_prompt": add_generation_prompt}
        return run_template(self._template, disarmed, safe_tools, variables, marker), marker


class Detokenizer:
    """Tokens to text as they come: the pushes and the flush together equal `Tokenizer.decode` of all ids."""

    def __init__(self, visible_bytes: Callable[[int], bytes]) -> None:
        self._visible_bytes = visible_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that this token completes; a character's first bytes wait for the rest."""
        return self._decoder.decode(self._visible_bytes(id))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The template's variables: a token stands as its text, or as an object with the text as ``content``."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = cast("Mapping[str, Any]", value).get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
        elif value is not None:
            raise CheckpointError(CONFIG_FILE, f"{name} must be a string or an object with a content")
    return found


def _ids(vocabulary: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # As a batch of one: `encode` would hold Python's lock, and with it every stream, for seconds on a long text.
    return vocabulary.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _build(spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(FILE, f"is not a valid tokenizer: {error}") from error


def _require_byte_level(spec: Mapping[str, Any]) -> None:
    """Refuse what the byte tables below would decode wrongly, or what would lose text."""
    model = spec.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping):
        raise UnsupportedModel(FILE, "model must be BPE with a vocab: this engine reads byte-level BPE only")
    bpe = cast("Mapping[str, Any]", model)
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(key):
            raise UnsupportedModel(FILE, f"model.{key} is {bpe[key]!r}: this engine reads byte-level BPE only")
    if bpe.get("type", "BPE") != "BPE" or _kinds(spec.get("decoder"), "decoders") != ["ByteLevel"]:
        raise UnsupportedModel(FILE, "model and decoder must be BPE and ByteLevel: nothing else is read")
    if "ByteLevel" not in _kinds(spec.get("pre_tokenizer"), "pretokenizers"):
        raise UnsupportedModel(FILE, "pre_tokenizer must be ByteLevel, or a sequence with it")
    missing = [symbol for symbol in byte_symbols() if symbol not in bpe["vocab"]]
    if missing:
        raise UnsupportedModel(FILE, f"model.vocab lacks {len(missing)} of the 256 bytes: text would be lost")


def _kinds(part: object, plural: str) -> list[str]:
    """The types of a decoder or pre-tokenizer, with a sequence opened."""
    if not isinstance(part, Mapping):
        return []
    table = cast("Mapping[str, Any]", part)
    if table.get("type") != "Sequence":
        return [str(table.get("type"))]
    return [kind for item in table.get(plural) or [] for kind in _kinds(item, plural)]


def _require_usable(token: tokenizers.AddedToken) -> None:
    text = token.content
    if len(text) < 2 or any(char.isalnum() or char.isspace() for char in (text[0], text[-1])):
        raise UnsupportedModel(
            FILE, f"added token {text!r} must have two characters or more, with punctuation at both ends"
        )
    if token.single_word:
        raise UnsupportedModel(FILE, f"added token {text!r} has single_word, which is not implemented")


def _without_controls(spec: Mapping[str, Any], controls: set[int]) -> dict[str, Any]:
    """The vocabulary for plain text. It lacks the control ids, so that no text can yield one."""
    model = dict(spec["model"])
    vocab: Mapping[str, int] = model["vocab"]
    gone = {text for text, id in vocab.items() if id in controls}
    model["vocab"] = {text: id for text, id in vocab.items() if text not in gone}
    merges: Iterable[str | list[str]] = model.get("merges") or []
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    model["merges"] = [pair for pair in pairs if gone.isdisjoint((*pair, "".join(pair)))]
    if model.get("unk_token") in gone:
        model["unk_token"] = None
    off = {"added_tokens": [], "truncation": None, "padding": None}
    return {**spec, "model": model, **off}


def _control_pattern(tokens: Sequence[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Finds control texts as the tokenizers library does: leftmost, longest, with the space they swallow."""
    ordered = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    parts = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in ordered]
    return re.compile("|".join(parts) or r"(?!)")


def byte_symbols() -> list[str]:
    """GPT-2's printable character for every byte: itself when visible in Latin-1, else from U+0100 on."""
    symbols: list[str] = []
    shifted = 0x100
    for byte in range(256):
        visible = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        symbols.append(chr(byte if visible else shifted))
        shifted += not visible
    return symbols


def _symbol_bytes(text: str, byte_of: Mapping[str, int]) -> bytes:
    """A vocabulary entry's bytes; as in the tokenizers library, a text of other characters is itself."""
    try:
        return bytes([byte_of[char] for char in text])
    except KeyError:
        return text.encode()


def _checked_texts(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any],
) -> list[str]:
    """Every string of a request, known to be valid Unicode."""
    found: list[str] = []
    sources = [(f"messages[{i}]", message) for i, message in enumerate(messages)]
    for where, source in [*sources, ("tools", tools), ("chat_template_kwargs", template_kwargs)]:
        for text in strings(source):
            check_unicode(text, where)
            found.append(text)
    return found
