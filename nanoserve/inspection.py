"""``nanoserve inspect``: what a checkpoint is, will take and will read, from headers or JSON alone."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from nanoserve.cache import CacheShape
from nanoserve.checkpoint import Checkpoint
from nanoserve.config import EngineConfig
from nanoserve.errors import MemoryPlanError
from nanoserve.kernels.table import describe
from nanoserve.models.config import NemotronHConfig
from nanoserve.plan import MemoryPlan, size, token_bytes, weights_by_format
from nanoserve.startup import Examined, examine, pick_dtypes
from nanoserve.weights import Manifest

_CONTEXTS = (2048, 32768, 131072)
_KINDS = {"M": "Mamba-2", "*": "attention", "E": "experts", "-": "MLP"}


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's description.

    Attributes:
        examined: the checkpoint, and this machine's choices for it.
        shape: cache types of a GPU, for the bytes a token.
        plan: for this machine; None when it does not fit, and ``misfit`` says why.
        misfit: empty when it fits.
    """

    examined: Examined
    shape: CacheShape
    plan: MemoryPlan | None
    misfit: str

    @property
    def config(self) -> NemotronHConfig:
        """The geometry."""
        return self.examined.config

    @property
    def manifest(self) -> Manifest:
        """The weights."""
        return self.examined.manifest

    @property
    def source(self) -> str:
        """What the precision is known from."""
        checkpoint = self.examined.checkpoint
        if checkpoint.tensors:
            return "tensors"
        if not checkpoint.quantization.declared:
            return "config.json alone, which declares no quantisation: taken as BF16"
        return "config files only"

    @property
    def types(self) -> str:
        """The cache types that the bytes a token are counted with."""
        conv, kv = (str(dtype).removeprefix("torch.") for dtype in (self.shape.conv_dtype, self.shape.kv_dtype))
        return f"on a GPU: conv state {conv}, SSM state float32, KV {kv}"

    def bytes_per_token(self, context: int) -> dict[str, int]:
        """Bytes one decoded token reads or writes on a GPU, by family."""
        return token_bytes(self.config, self.manifest, self.shape, context)

    def data(self) -> dict[str, Any]:
        """The description as JSON."""
        plan = self.plan
        return {
            "name": self.examined.checkpoint.name,
            "source": self.source,
            "pattern": self.config.pattern,
            "layers": dict(Counter(_KINDS[letter] for letter in self.config.pattern)),
            "weights_bytes": weights_by_format(self.manifest),
            "mtp_skipped_bytes": self.manifest.skipped_mtp_bytes,
            "modules": self.modules(),
            "bytes_per_token": {
                str(context): {**(parts := self.bytes_per_token(context)), "total": sum(parts.values())}
                for context in _CONTEXTS
            },
            "bytes_per_token_types": self.types,
            "ops": {row.op: row.backend for row in self.examined.ops.report},
            "ops_not_taken": {
                row.op: {name: why.code.value for name, why in row.rejected} for row in self.examined.ops.report
            },
            "memory_plan": None
            if plan is None
            else {
                "weights": plan.weights,
                "kv": plan.kv,
                "kv_per_token": plan.kv_per_token,
                "state": plan.state,
                "workspace": plan.workspace,
                "left": plan.left,
                "available": plan.available,
                "budget": plan.budget,
                "max_context": plan.max_context,
                "largest_context": plan.largest_context,
            },
            "memory_plan_error": self.misfit or None,
        }

    def modules(self) -> dict[str, str]:
        """Linear module → format; a layer's experts are one entry."""
        out: dict[str, str] = {}
        for item in self.manifest.items:
            if item.entry.is_linear:
                prefix = "" if item.layer is None else f"backbone.layers.{item.layer}."
                out[prefix + item.entry.name.format("*")] = item.format.value
        return out

    def text(self) -> str:
        """The description for a terminal."""
        lines = [
            f"{self.examined.checkpoint.name} (from {self.source})",
            f"  pattern          {self.config.pattern}",
        ]
        counts = Counter(_KINDS[letter] for letter in self.config.pattern)
        lines.append("  layers           " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        lines += ["", "precision by module (layers)", *self._precision()]
        lines += ["", "memory plan for this machine"]
        if self.plan:
            lines += [f"  {purpose:<16} {amount}" for purpose, amount in self.plan.rows()]
        else:
            formats = ", ".join(f"{name} {size(n)}" for name, n in weights_by_format(self.manifest).items())
            lines += [f"  weights          {formats}", f"  {self.misfit}"]
        lines += [f"  ops              {line}" for line in describe(self.examined.ops.report)]
        if self.manifest.skipped_mtp:
            lines.append(f"  not read         {size(self.manifest.skipped_mtp_bytes)} of MTP tensors")
        lines += ["", f"bytes a decoded token reads or writes ({self.types})", *self._token_table()]
        return "\n".join(lines)

    def _precision(self) -> list[str]:
        groups: dict[tuple[str, str], list[int]] = {}
        for item in self.manifest.items:
            if item.entry.is_linear:
                name = item.entry.name.removeprefix("mixer.").format("*")
                groups.setdefault((name, item.format.value), []).append(-1 if item.layer is None else item.layer)
        return [
            f"  {name:<26} {form:<6}" + ("" if layers == [-1] else " " + " ".join(map(str, layers)))
            for (name, form), layers in groups.items()
        ]

    def _token_table(self) -> list[str]:
        columns = [self.bytes_per_token(context) for context in _CONTEXTS]
        head = f"  {'context':<16}" + "".join(f"{context:>12,}" for context in _CONTEXTS)
        rows = [f"  {family:<16}" + "".join(f"{size(c[family]):>12}" for c in columns) for family in columns[0]]
        return [head, *rows, f"  {'total':<16}" + "".join(f"{size(sum(c.values())):>12}" for c in columns)]


def inspect_checkpoint(checkpoint: Checkpoint, options: EngineConfig) -> Inspection:
    """Describe a checkpoint without reading a weight.

    Raises:
        CheckpointError, UnsupportedModel, BackendError, ConfigError: as `nanoserve.startup.examine`.
    """
    examined = examine(checkpoint, options)
    plan, misfit = None, ""
    try:
        plan = examined.plan()
    except MemoryPlanError as error:
        misfit = str(error)
    gpu_dtype, gpu_kv = pick_dtypes(options, "cuda", checkpoint.quantization.kv_cache_fp8)
    shape = CacheShape(0, options.page_size, gpu_kv, gpu_dtype)
    return Inspection(examined, shape, plan, misfit)
