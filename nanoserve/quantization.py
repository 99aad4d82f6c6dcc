"""What a checkpoint's JSON says of how each linear layer's weight is stored.

ModelOpt writes it in up to two places: ``hf_quant_config.json`` and ``quantization_config`` in ``config.json``.
Either one gives a rule for all linear layers with exceptions, or a map of modules, or both. The tensors have
the last word (`nanoserve.checkpoint.stored_format`); this is what they are checked against.
"""

import enum
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, cast

from nanoserve.errors import CheckpointError, UnsupportedModel

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"


class Format(enum.Enum):
    """How a linear layer's weight is stored; BF16 stands for every float type that is not quantised."""

    BF16 = "bf16"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


GROUP = 16
"""Weights that share an NVFP4 block scale."""

_WEIGHT_ONLY = "W4A16_NVFP4"
# NVFP4 with 4-bit activations is stored as its weight-only twin, and run as it but by backends that say otherwise.
_ALGORITHMS: Mapping[str | None, Format] = {
    None: Format.BF16,
    "FP8": Format.FP8,
    "NVFP4": Format.NVFP4,
    _WEIGHT_ONLY: Format.NVFP4,
}
_MIXED = "MIXED_PRECISION"
_ALL_LINEAR = "Linear"
_PROJECTIONS = frozenset(
    [
        "in_proj",
        "out_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
        "fc1_latent_proj",
        "fc2_latent_proj",
        "lm_head",
    ]
)


@dataclass(frozen=True, slots=True)
class _Rules:
    """One JSON file's statements; names may be containers, which cover the projections below them."""

    file: str
    names: Mapping[str, Format]
    excluded: re.Pattern[str] | None
    globs: tuple[tuple[re.Pattern[str], Format], ...]
    default: Format | None
    kv_cache_fp8: bool | None

    def format_of(self, module: str) -> Format | None:
        named = self.names.get(module)
        if named is not None:
            return named
        if self.excluded and self.excluded.match(module):
            return Format.BF16
        covering = self._covering(module)
        # A rule for many modules means projections: no release quantises gate, conv1d, norms or embeddings,
        # and the exclude list of Nano-3 does not name all of them.
        return covering if covering is None or _is_projection(module) else Format.BF16

    def _covering(self, module: str) -> Format | None:
        end = module.rfind(".")
        while end > 0:
            named = self.names.get(module[:end])
            if named is not None:
                return named
            end = module.rfind(".", 0, end)
        for pattern, stored in self.globs:
            if pattern.match(module):
                return stored
        return self.default


@dataclass(frozen=True)
class Quantization:
    """The JSON's word on every module, from `parse`.

    Attributes:
        kv_cache_fp8: the checkpoint declares an FP8 KV cache.
        source: the file name(s) it comes from, for messages.
        weight_only: NVFP4 weights were made for activations that are not quantised.
    """

    kv_cache_fp8: bool
    source: str
    _rules: tuple[_Rules, ...] = ()
    weight_only: bool = False

    @property
    def declared(self) -> bool:
        """Whether the JSON says anything of quantisation."""
        return bool(self._rules)

    @property
    def names_modules(self) -> bool:
        """Whether it says which modules are quantised, or gives a rule for all; exclusions alone do not."""
        named = any(stored is not Format.BF16 for rules in self._rules for stored in rules.names.values())
        return named or any(rules.globs or rules.default for rules in self._rules)

    def format_of(self, module: str) -> Format | None:
        """The format that the JSON gives a module such as ``backbone.layers.0.mixer.in_proj``.

        None means that the JSON says nothing of it.

        Raises:
            CheckpointError: the two files contradict one another.
        """
        answer: Format | None = None
        for rules in self._rules:
            said = rules.format_of(module)
            if answer is not None and said is not None and said is not answer:
                raise _contradiction(module, self._rules[0].file, answer, rules.file, said)
            answer = answer if said is None else said
        return answer


def parse(config_json: Mapping[str, Any], hf_quant_json: Mapping[str, Any] | None) -> Quantization:
    """Read the quantisation out of ``config.json`` and ``hf_quant_config.json`` (None when there is none).

    Raises:
        UnsupportedModel: an algorithm, group size or scheme that this engine does not implement.
        CheckpointError: an entry is malformed, or two entries contradict one another.
    """
    rules: list[_Rules] = []
    tables: list[Mapping[str, Any]] = []
    if hf_quant_json is not None:
        table = _table(HF_QUANT_CONFIG, "quantization", hf_quant_json.get("quantization"))
        rules.append(_read(HF_QUANT_CONFIG, table))
        tables.append(table)
    if config_json.get("quantization_config"):
        table = _table(CONFIG, "quantization_config", config_json["quantization_config"])
        _check_method(table)
        if "quantization" in table:  # ModelOpt's older spelling wraps the other file's object
            table = _table(CONFIG, "quantization_config.quantization", table["quantization"])
        rules.append(_read(CONFIG, table))
        tables.append(table)
    kv = {rule.kv_cache_fp8 for rule in rules} - {None}
    if len(kv) > 1:
        raise CheckpointError(HF_QUANT_CONFIG, f"its KV cache format contradicts {CONFIG}: restore one of them")
    source = " and ".join(rule.file for rule in rules) or CONFIG
    weight_only = any(map(_is_weight_only, tables))
    quantization = Quantization(True in kv, source, tuple(rules), weight_only)
    if len(rules) > 1:
        for name in dict.fromkeys(name for rule in rules for name in rule.names):
            quantization.format_of(name)
    return quantization


def canonical_name(name: str) -> str:
    """A module's or tensor's name as the releases spell it: transformers 5 writes ``model.`` for ``backbone.``."""
    return "backbone." + name[len("model.") :] if name.startswith("model.") else name


def _read(file: str, table: Mapping[str, Any]) -> _Rules:
    excludes = [*_names(file, table, "exclude_modules"), *_names(file, table, "ignore")]
    claims = [*_algorithm(file, table), *_layer_map(file, table), *_groups(file, table)]
    # A mixture may leave the map to the other file, or to the tensors: stubs of that kind are about.
    if not claims and table.get("quant_algo") != _MIXED:
        raise CheckpointError(
            file, "its quantization names no module: quantized_layers or config_groups is missing"
        )
    names, globs = _settle(file, claims + [(name, Format.BF16) for name in excludes])
    default = names.pop(_ALL_LINEAR, None)
    excluded = _pattern(name for name in excludes if _is_glob(name))
    for name, stored in names.items():
        if excluded and stored is not Format.BF16 and excluded.match(name):
            raise CheckpointError(file, f"is listed both as {stored.value} and among the excluded", _shown(name))
    grouped = [(stored, [g for g, s in globs.items() if s is stored]) for stored in (Format.FP8, Format.NVFP4)]
    patterns = tuple((found, stored) for stored, each in grouped if (found := _pattern(each)))
    return _Rules(file, names, excluded, patterns, default, _kv_cache_fp8(file, table))


def _is_weight_only(table: Mapping[str, Any]) -> bool:
    """Whether NVFP4 weights are named as weight-only; the table has been read, and is well-formed."""
    given = (_given(table, key, {}) for key in ("quantized_layers", "config_groups"))
    layers, groups = (cast("Mapping[str, Any]", value) for value in given)
    named = any(entry.get("quant_algo") == _WEIGHT_ONLY for entry in (table, *layers.values()))
    four = [group for group in groups.values() if group["weights"]["num_bits"] == 4]
    return named or any(not group.get("input_activations") for group in four)


_Claims = list[tuple[str, Format]]


def _settle(file: str, claims: _Claims) -> tuple[dict[str, Format], dict[str, Format]]:
    """Exact names and globs apart; a name that is claimed twice must be claimed for one format."""
    names: dict[str, Format] = {}
    globs: dict[str, Format] = {}
    for name, stored in claims:
        first = (globs if _is_glob(name) else names).setdefault(name, stored)
        if first is not stored:
            raise _contradiction(name, file, first, file, stored)
    return names, globs


def _algorithm(file: str, table: Mapping[str, Any]) -> _Claims:
    """The rule for all linear layers, if there is one."""
    if "quant_algo" not in table or table["quant_algo"] == _MIXED:
        return []
    return [(_ALL_LINEAR, _format(file, "quant_algo", table))]


def _layer_map(file: str, table: Mapping[str, Any]) -> _Claims:
    layers = _table(file, "quantized_layers", _given(table, "quantized_layers", {}))
    claims: _Claims = []
    for name, entry in layers.items():
        where = f"quantized_layers[{_shown(name)}]"
        claims.append((_clean(name), _format(file, where, _table(file, where, entry))))
    return claims


def _groups(file: str, table: Mapping[str, Any]) -> _Claims:
    """``config_groups``: bits of the weights, and the modules (or "Linear" for all) that have them."""
    groups = _table(file, "config_groups", _given(table, "config_groups", {}))
    claims: _Claims = []
    for key, value in groups.items():
        where = f"config_groups[{_shown(key)}]"
        group = _table(file, where, value)
        stored = _group_format(file, where, _table(file, f"{where}.weights", group.get("weights")))
        claims += [(name, stored) for name in _names(file, group, "targets")]
    return claims


def _group_format(file: str, where: str, weights: Mapping[str, Any]) -> Format:
    bits, kind = weights.get("num_bits"), weights.get("type")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if (bits, kind, size) == (4, "float", GROUP):
        return Format.NVFP4
    if (bits, kind, size) == (8, "float", None) and strategy in (None, "tensor"):
        return Format.FP8
    raise UnsupportedModel(
        file,
        f"{where}.weights has num_bits {_shown(bits)}, type {_shown(kind)}, group_size {_shown(size)}, strategy "
        f"{_shown(strategy)}: weights must be NVFP4 in groups of {GROUP}, or FP8 with one scale a tensor",
    )


def _format(file: str, where: str, entry: Mapping[str, Any]) -> Format:
    if "quant_algo" not in entry:
        raise CheckpointError(file, f"{where} has no quant_algo")
    algorithm, size = entry["quant_algo"], entry.get("group_size")
    if not (algorithm is None or isinstance(algorithm, str)) or algorithm not in _ALGORITHMS:
        known = ", ".join(str(name) for name in _ALGORITHMS if name)
        raise UnsupportedModel(file, f"{where}: quant_algo is {_shown(algorithm)}; this engine knows {known}")
    if size is not None and size != GROUP:
        raise UnsupportedModel(file, f"{where}: group_size is {_shown(size)} and must be {GROUP}")
    return _ALGORITHMS[algorithm]


def _kv_cache_fp8(file: str, table: Mapping[str, Any]) -> bool | None:
    """True, False, or None when the file does not speak of the KV cache."""
    if "kv_cache_quant_algo" in table:
        algorithm = table["kv_cache_quant_algo"]
        if algorithm in (None, "FP8"):
            return algorithm == "FP8"
        raise UnsupportedModel(file, f"kv_cache_quant_algo is {_shown(algorithm)} and must be FP8 or null")
    if table.get("kv_cache_scheme") is None:
        return None
    scheme = _table(file, "kv_cache_scheme", table["kv_cache_scheme"])
    if (scheme.get("num_bits"), scheme.get("type"), scheme.get("dynamic", False)) == (8, "float", False):
        return True
    raise UnsupportedModel(file, f"kv_cache_scheme is {_shown(dict(scheme))} and must be static 8-bit float")


def _check_method(table: Mapping[str, Any]) -> None:
    method = table.get("quant_method")
    if method is not None and not str(method).startswith("modelopt"):
        raise UnsupportedModel(
            CONFIG, f"quantization_config.quant_method is {_shown(method)}; this engine reads ModelOpt checkpoints"
        )


def _names(file: str, table: Mapping[str, Any], key: str) -> Iterator[str]:
    entries = _given(table, key, [])
    if not isinstance(entries, list):
        raise CheckpointError(file, f"{key} must be a list of module names")
    for entry in cast("list[object]", entries):
        if not isinstance(entry, str) or entry.startswith("re:"):
            raise CheckpointError(file, f"{key} holds {_shown(entry)} and must hold module names or globs")
        yield _clean(entry)


def _given(table: Mapping[str, Any], key: str, otherwise: object) -> object:
    value = table.get(key)
    return otherwise if value is None else value


def _table(file: str, where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(file, f"{where} must be a JSON object and is {_shown(value)}")
    return cast("Mapping[str, Any]", value)


def _clean(name: str) -> str:
    r"""The name without what ModelOpt's exporter can leave behind it: ``.\\0backbone.pt_name_sentinel``."""
    return canonical_name(name.partition("\0")[0].removesuffix(".") if "\0" in name else name)


def _is_projection(module: str) -> bool:
    return module[module.rfind(".") + 1 :] in _PROJECTIONS


def _is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _pattern(globs: Iterable[str]) -> re.Pattern[str] | None:
    """One expression for all globs; like names, they cover what lies below a match."""
    parts = [fnmatch.translate(each) for glob in dict.fromkeys(globs) for each in (glob, glob + ".*")]
    return re.compile("|".join(parts)) if parts else None


def _shown(value: object) -> str:
    """The value on one short line, whatever is in it."""
    text = value if isinstance(value, str) and value.isprintable() else brief(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _contradiction(
    module: str, first: str, first_says: Format, second: str, second_says: Format
) -> CheckpointError:
    there = "elsewhere in the same file" if first == second else f"in {second}"
    problem = f"is {first_says.value} here and {second_says.value} {there}: restore the original files"
    return CheckpointError(first, problem, _shown(module))
