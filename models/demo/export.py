r"""BF16 to the 3.5-Lightning mix of precisions, quantised, calibrated and exported by NVIDIA ModelOpt.

    python -m nanoserve.models.demo.export BF16_DIR OUT_DIR [--calibration TOKENS.jsonl]

Needs what the engine does not (versions that work together; ModelOpt's own pin of transformers, below 5.15, fails
on dense layers, hence the second command):

    pip install torch==2.13.0 'nvidia-modelopt[hf]==0.47.0'
    pip install transformers==5.23.0 requests

Routed experts, shared experts, dense layers and lm_head become weight-only NVFP4, Mamba's projections FP8, the KV
cache FP8; all else keeps the input's bits. No release has dense layers in this mix: they go with the shared
experts, which they resemble. The multi-token-prediction block, which transformers cannot load, is copied.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoserve.checkpoint import GENERATION_CONFIG, SINGLE, Checkpoint, open_checkpoint
from nanoserve.errors import CheckpointError, ConfigError, NanoserveError
from nanoserve.files import read_object, read_text
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.demo.export_check import report
from nanoserve.quantization import CONFIG, GROUP, HF_QUANT_CONFIG, Format
from nanoserve.weights import resolve

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
"""Files that pass through as they are, where they are there."""

MTP = "mtp"
SEQUENCES, SEQUENCE_LENGTH = 64, 128
"""Random calibration; a file's own sequences are used whole."""

_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
_RESIDUE = ".\0"

# "dynamic" blocks need no GPU, and make no difference to stored weights: scales come from the weights either way.
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: GROUP, "type": "dynamic", "scale_bits": (4, 3)}}
_FP8: Mapping[str, Any] = {"num_bits": (4, 3), "axis": None}
_RECIPE: Mapping[str, Any] = {
    "algorithm": "max",
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*mixer.experts*weight_quantizer", "cfg": _NVFP4},
        {"quantizer_name": "*mixer.shared_experts*weight_quantizer", "cfg": _NVFP4},
        {"quantizer_name": "*mixer.up_proj.weight_quantizer", "cfg": _NVFP4},
        {"quantizer_name": "*mixer.down_proj.weight_quantizer", "cfg": _NVFP4},
        {"quantizer_name": "lm_head.weight_quantizer", "cfg": _NVFP4},
        {"quantizer_name": "*mixer.in_proj*weight_quantizer", "cfg": _FP8},
        {"quantizer_name": "*mixer.in_proj*input_quantizer", "cfg": _FP8},
        {"quantizer_name": "*mixer.out_proj*weight_quantizer", "cfg": _FP8},
        {"quantizer_name": "*mixer.out_proj*input_quantizer", "cfg": _FP8},
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _FP8},
    ],
}


def export(source: Path, out: Path, calibration: Path | None) -> str:
    """Write the quantised checkpoint, then check it.

    Args:
        source: a BF16 checkpoint.
        out: a new or empty directory.
        calibration: a JSON list of token ids a line; None takes random ids.

    Returns:
        The check's table.

    Raises:
        NanoserveError: an input is not as it should be, or the output is not.
    """
    checkpoint = open_checkpoint(source)
    config = NemotronHConfig.from_json(checkpoint.config)
    _refuse_quantised(checkpoint, config)
    sequences = read_sequences(calibration, config.vocab_size) if calibration else random_sequences(config)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: name a new directory")
    with tempfile.TemporaryDirectory(dir=out, prefix="modelopt-") as temporary:
        made = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):
            _run_modelopt(source, made, sequences)
        tensors = merge(_load_all(made), _load_all(source))
        quantization = clean(read_object(made, CONFIG)["quantization_config"])
        hf_quant = clean(read_object(made, HF_QUANT_CONFIG))
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    if any(name.startswith(f"{MTP}.") for name in tensors):
        quantization = excluding_mtp(quantization, "ignore")
        hf_quant["quantization"] = excluding_mtp(hf_quant["quantization"], "exclude_modules")
    _write_json(out / CONFIG, {**checkpoint.config, "quantization_config": quantization})
    _write_json(out / HF_QUANT_CONFIG, hf_quant)
    copy_files(source, out)
    return report(source, out)


def copy_files(source: Path, out: Path) -> None:
    """What passes through as it is."""
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def _refuse_quantised(checkpoint: Checkpoint, config: NemotronHConfig) -> None:
    for item in resolve(checkpoint, config).items:
        if item.format is not Format.BF16:
            raise CheckpointError(CONFIG, "is quantised already; give the BF16 model", item.parts[0].names[0])


def random_sequences(config: NemotronHConfig) -> list[list[int]]:
    """Token ids that stand for text where there is none; the same every time."""
    print("no --calibration: FP8 scales of activations and KV come from random token ids", file=sys.stderr)
    random = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, min(SEQUENCE_LENGTH, config.max_position_embeddings))
    return torch.randint(config.vocab_size, shape, generator=random).tolist()


def read_sequences(path: Path, vocab_size: int) -> list[list[int]]:
    """The token sequences of a JSON-lines file; empty lines are skipped.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: a line is no list of token ids, or there is none.
    """
    sequences: list[list[int]] = []
    for number, line in enumerate(read_text(path.parent, path.name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except ValueError:
            value = None
        ids = cast("list[object]", value) if isinstance(value, list) else []
        if not ids or not all(type(id) is int and 0 <= id < vocab_size for id in ids):
            raise ConfigError(f"{path}:{number} must be a JSON list of token ids in [0, {vocab_size})")
        sequences.append(cast("list[int]", ids))
    if not sequences:
        raise ConfigError(f"{path} holds no token sequences")
    return sequences


def _run_modelopt(source: Path, out: Path, sequences: Sequence[Sequence[int]]) -> None:
    """Quantise and export: everything of ModelOpt's and transformers', none of which is typed."""
    try:
        quantization: Any = import_module("modelopt.torch.quantization")
        exporter: Any = import_module("modelopt.torch.export")
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"this export needs ModelOpt ({error}): see the top of {__file__}") from error
    # One thread: sums over another number of threads round differently, and so would the scales.
    torch.set_num_threads(1)
    model = transformers.NemotronHForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, experts_implementation="eager"
    )
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps dt in prefill alone; the model does not
            module.time_step_limit = (0.0, float("inf"))

    def run(model: Any) -> None:
        for ids in sequences:  # one at a time: padding would count as text
            model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)

    with torch.inference_mode():
        model = quantization.quantize(model, _RECIPE, run)
    exporter.export_hf_checkpoint(model, export_dir=out)


def merge(exported: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exporter's quantised tensors, and the source's own bits for all others.

    transformers holds all floats but the router's bias in one dtype, so what it writes may be rounded.

    Args:
        exported: what ModelOpt wrote.
        source: the BF16 checkpoint's tensors.

    Raises:
        CheckpointError: a tensor was lost, added, or changed by more than a rounding to the exporter's dtype.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in exported.items():
        original = source.get(name)
        if original is None:
            if not name.endswith(_SCALES):
                raise CheckpointError(SINGLE, "was exported, and the source has no such tensor", name)
            merged[name] = tensor
        elif f"{name}_scale" in exported:
            merged[name] = tensor
        elif original.shape != tensor.shape or not torch.equal(original.to(tensor.dtype), tensor):
            raise CheckpointError(SINGLE, "is not quantised, and the exporter changed it", name)
        else:
            merged[name] = original
    for name, tensor in source.items():
        if name.startswith(f"{MTP}."):
            merged[name] = tensor
        elif name not in exported:
            raise CheckpointError(SINGLE, "was not exported", name)
    return {name: merged[name].contiguous() for name in sorted(merged)}


def clean(value: Any) -> Any:
    r"""A JSON value without what ModelOpt 0.47's exporter leaves behind names.

    The residue is ``.\0backbone.pt_name_sentinel``: its renaming of "model." strikes in its own
    ``.\0modelopt_name_sentinel``, which it then fails to take off.
    """
    if isinstance(value, str):
        return value.partition(_RESIDUE)[0]
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [clean(each) for each in cast("list[Any]", value)]
    return value


def excluding_mtp(quantization: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The quantisation with the multi-token-prediction block in its list of unquantised modules.

    Args:
        quantization: of either JSON file.
        key: the list's name there: ``ignore`` or ``exclude_modules``.
    """
    glob = f"{MTP}*"
    others = [name for name in quantization.get(key) or [] if name != glob]
    return {**quantization, key: [*others, glob]}


def _load_all(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nanoserve.models.demo.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="BF16_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--calibration", type=Path, metavar="TOKENS.jsonl", help="a JSON list of token ids a line")
    options = parser.parse_args(arguments)
    try:
        print(export(options.source, options.out, options.calibration))
    except NanoserveError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
