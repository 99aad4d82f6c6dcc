"""From options and a checkpoint to a running engine, in the order a user sees it."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoserve.cache import Cache, CacheShape
from nanoserve.calibrating import calibrated
from nanoserve.checkpoint import Checkpoint
from nanoserve.config import EngineConfig
from nanoserve.dense_scales import dense_scales, with_dense
from nanoserve.engine import Engine
from nanoserve.errors import BackendError, ConfigError, MemoryPlanError
from nanoserve.experts import expert_costs, expert_facts, with_prepared
from nanoserve.graph import Capture, Decoder, obstacles
from nanoserve.kernels.place import Experts
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.table import Ops, select
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.nemotron_h import Fields, NemotronH
from nanoserve.op_cases import Subject
from nanoserve.plan import MemoryPlan, plan_memory, size
from nanoserve.step import DecodeBuffers
from nanoserve.warm_up import Say, compiling, silent, warm_up
from nanoserve.weights import Manifest, Progress, load, resolve

_SMALL = 512
"""Hidden size up to which one CPU thread is fastest: medians of ten answers of the demo model on two cores are 33
tokens/s, and 24 with torch's own choice; a busy second core makes the difference larger."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Examined:
    """What headers, JSON files and the device tell; ``shape.max_context`` is 0 until a memory plan sets it."""

    checkpoint: Checkpoint
    options: EngineConfig
    config: NemotronHConfig
    manifest: Manifest
    device: torch.device
    ops: Ops
    shape: CacheShape

    @property
    def end_ids(self) -> frozenset[int]:
        """What ends an answer; an id beyond the vocabulary can never come, so it can never end anything."""
        return frozenset(id for id in self.checkpoint.eos_token_ids if id < self.config.vocab_size)

    @property
    def experts(self) -> Experts | None:
        """The routed experts, as backends see them."""
        return expert_facts(self.config, self.manifest)

    @property
    def backends(self) -> dict[str, str]:
        """Op → backend."""
        return {row.op: row.backend for row in self.ops.report}

    @property
    def prefill_chunk(self) -> int:
        """Tokens a prefill step takes at most: on a GPU so many that every expert gets its share."""
        return self.options.prefill_chunk or (2048 if self.device.type == "cuda" else 512)

    @property
    def decode(self) -> str:
        """How decode steps are launched, and why."""
        blocked = obstacles(self.ops, self.device)
        if self.graph:
            return "one CUDA graph a token"
        return f"op by op ({'chosen by name' if self.options.decode == 'eager' else blocked[0]})"

    @property
    def graph(self) -> bool:
        """Whether decode steps are launched as a CUDA graph."""
        return self.options.decode != "eager" and not obstacles(self.ops, self.device)

    def plan(self) -> MemoryPlan:
        """Fit it into what the device has free now.

        Raises:
            MemoryPlanError: it does not fit.
        """
        return plan_memory(
            self.config,
            self.manifest,
            self.shape,
            wanted_context=self.options.max_context,
            prefill_chunk=self.prefill_chunk,
            keys_at_once=self.ops.backend("attention_prefill") == "torch",
            available=free_memory(self.device),
            fraction=self.options.memory_fraction,
            experts=expert_costs(self.experts, self.backends, self.prefill_chunk),
            dense_scales=dense_scales(self.manifest, self.backends),
        )


@dataclass(frozen=True, slots=True)
class Prepared(Examined):
    """All that is known before the first weight is read."""

    memory: MemoryPlan


def examine(checkpoint: Checkpoint, options: EngineConfig) -> Examined:
    """Check the checkpoint and the options.

    Raises:
        CheckpointError, UnsupportedModel: the checkpoint.
        BackendError, ConfigError: the options.
    """
    config = NemotronHConfig.from_json(checkpoint.config)
    manifest = resolve(checkpoint, config)
    device = pick_device(options)
    dtype, kv_dtype = pick_dtypes(options, device.type, checkpoint.quantization.kv_cache_fp8)
    ops = select(device, dtype, options.ops, expert_facts(config, manifest))
    if options.decode == "graph" and (blocked := obstacles(ops, device)):
        raise BackendError(f"decode is 'graph', and {'; '.join(map(str, blocked))}: use 'auto' or 'eager'")
    shape = CacheShape(0, options.page_size, kv_dtype, dtype)
    return Examined(checkpoint, options, config, manifest, device, ops, shape)


def prepare(checkpoint: Checkpoint, options: EngineConfig, say: Say = silent) -> Prepared:
    """Check everything, choose the fastest backend where several are able, and fit it into the device's memory.

    Args:
        checkpoint: the model.
        options: the engine's.
        say: called with a line now and then, where something is measured.

    Raises:
        CheckpointError, UnsupportedModel, BackendError, ConfigError: as `examine`.
        MemoryPlanError: it does not fit.
    """
    e = examine(checkpoint, options)
    if options.calibrate:
        e = replace(e, ops=calibrated(subject_of(e), e.ops, options.ops, say)[0])
    memory = e.plan()
    shape = replace(e.shape, max_context=memory.max_context)
    return Prepared(e.checkpoint, e.options, e.config, e.manifest, e.device, e.ops, shape, memory)


def subject_of(e: Examined) -> Subject:
    """What ops are checked and timed for."""
    return Subject.of(e.config, e.manifest, e.device, e.shape.conv_dtype, e.shape.kv_dtype)


def load_engine(prepared: Prepared, progress: Progress, say: Say = silent) -> Engine:
    """Read the weights and allocate the cache.

    Args:
        prepared: what is to be loaded.
        progress: called with (bytes read, bytes in all).
        say: as of `assemble`.

    Raises:
        CheckpointError: what only the data shows.
        MemoryPlanError: there was less memory than planned with.
    """
    p = prepared
    if (threads := cpu_threads(p)) is not None:
        torch.set_num_threads(threads)  # also for threads that this process starts later
    try:
        return assemble(p, load(p.checkpoint, p.manifest, p.device, progress), say)
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            f"the memory ran out while loading: {size(p.memory.budget - p.memory.left)} are needed, of "
            f"{size(p.memory.available)} that were free before, and {size(free_memory(p.device))} are left: "
            "another program takes some; end it, or ask for a smaller --max-context"
        ) from error


def assemble(prepared: Prepared, fields: Fields, say: Say = silent) -> Engine:
    """The engine over weights that are there, with its cache; captures the decode step where it is to be a graph.

    On a GPU it answers some prompts, so that no request waits for a compiler.

    Args:
        prepared: what is to run.
        fields: its weights.
        say: called with a line for what is compiled.

    Raises:
        EngineError: it cannot be captured, or a weight is damaged.
    """
    p = prepared
    scales = tuple((fields[i, "k_scale"], fields[i, "v_scale"]) for i in p.config.layers("*"))
    dtype = p.shape.conv_dtype
    fields = with_prepared(fields, p.experts, p.backends, p.prefill_chunk, dtype, p.device)
    fields = with_dense(fields, p.manifest, p.backends, p.checkpoint)
    model = NemotronH.build(p.config, p.ops, dtype, fields)
    cache = Cache.allocate(p.config, p.shape, p.device, scales)
    buffers = DecodeBuffers.allocate(p.config.vocab_size, p.device)
    sampler = SamplerState.allocate(p.config.vocab_size, p.device)
    compiles = p.device.type == "cuda" and any(backend != "torch" for backend in p.backends.values())
    with compiling("decode steps", say) if compiles else nullcontext():
        decoder = Decoder.make(model, cache, buffers, sampler, Capture.new() if p.graph else None)
    engine = Engine(
        model=model,
        cache=cache,
        buffers=buffers,
        sampler=sampler,
        decoder=decoder,
        device=p.device,
        end_ids=p.end_ids,
        prefill_chunk=p.prefill_chunk,
    )
    if compiles:
        warm_up(engine, say)
    return engine


def cpu_threads(examined: Examined) -> int | None:
    """Threads to compute on, where torch's default is a bad one and the user has not chosen."""
    small = examined.device.type == "cpu" and examined.config.hidden_size <= _SMALL
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else None


def pick_device(options: EngineConfig) -> torch.device:
    """The device of the options; "auto" is the GPU when there is one."""
    have_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not have_gpu:
        raise ConfigError("device is 'cuda' and torch finds no GPU here: use 'cpu' or 'auto'")
    return torch.device("cuda" if have_gpu and options.device != "cpu" else "cpu")


def pick_dtypes(options: EngineConfig, device_type: str, kv_declared_fp8: bool) -> tuple[torch.dtype, torch.dtype]:
    """(activations, KV cache). On the CPU nothing is rounded unless asked for."""
    on_cpu = device_type == "cpu"
    dtype = _DTYPES[options.dtype] if options.dtype != "auto" else _DTYPES["float32" if on_cpu else "bfloat16"]
    if options.kv_dtype != "auto":
        return dtype, _DTYPES[options.kv_dtype]
    return dtype, _DTYPES["fp8"] if kv_declared_fp8 and not on_cpu else dtype


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; on the CPU the least of what the machine and the control group leave.

    A GPU that shares the CPU's memory (DGX Spark) is asked like the CPU: the driver does not count what the system
    holds of files, tens of gigabytes once a checkpoint was read, which it gives up when it is asked for memory.
    """
    if device.type == "cuda" and not shares_memory(device):
        # What torch has freed and kept (an engine closed before this one, say) is as good as free.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))
    limit, used, cached = _control_group(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, max(limit - used + cached, 0))


def shares_memory(device: torch.device) -> bool:
    """Whether a GPU has no memory of its own."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _control_group(group: Path) -> tuple[int | None, int, int]:
    """(limit or None, bytes used, bytes of those that are file cache) of this container's memory group."""
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None, 0, 0  # not in a group of its own
    return (int(limit) if limit.strip().isdigit() else None), int(used), int(stat.get("file", 0))
