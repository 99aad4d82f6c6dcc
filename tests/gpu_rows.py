"""By hand, on a card: what issue 5 asks for beside `nanoserve bench`'s own table, at a released geometry.

    cd tests && PYTHONPATH=..:. python gpu_rows.py COMMIT OUT [http long context drift same]

http: TPOT of a streamed answer through the server, read by another process, beside TPOT in process.
long: 8,192 tokens decoded in one go: time a token early and late, device memory before and after, the same again.
drift: the demonstration model's logits after 8,192 decode steps, beside those of a prefill of the same tokens.
same: the tokens of decode steps op by op and as a graph, over the same weights; greedy, seeded and truncated.
context: TPOT at 2k and at 32k of context, beside the time that the additional bytes take.
Written to OUT/rows_SHAPE.json after each.
"""

import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanoserve import server
from nanoserve.bench import BenchOptions, run
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig, ServerConfig, ShapeName, build
from nanoserve.engine import Engine
from nanoserve.files import DEMO_MODEL
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.shapes import prepare_shape, random_fields
from nanoserve.startup import Prepared, assemble, load_engine, prepare
from nanoserve.step import prefill
from nanoserve.traffic import read_bandwidth, token_traffic
from nanoserve.weights import load
from nanoserve.worker import Worker

SHAPE: ShapeName = "nano"
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 3},
    "truncated": {"seed": 4, "top_p": 0.9, "top_k": 30},
}
CLIENT = """
import http.client, json, sys, time
port, prompt, tokens = int(sys.argv[1]), json.load(sys.stdin), int(sys.argv[2])
link = http.client.HTTPConnection("127.0.0.1", port)
body = {"prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": 1, "stream": True, "ignore_eos": True,
        "return_token_ids": True}
link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
answer = link.getresponse()
assert answer.status == 200, answer.read()
stamps, count = [], 0
for line in answer:
    if line.startswith(b"data: {"):
        got = len(json.loads(line[6:])["choices"][0].get("token_ids") or [])
        if got:
            stamps.append(time.perf_counter())
            count += got
tpot = 1e3 * (stamps[-1] - stamps[0]) / (count - 1)
print(json.dumps({"tpot_ms": tpot, "tokens": count, "events": len(stamps)}))
"""


def quiet(done: int, total: int) -> None:
    """No progress."""


def made(max_context: int) -> tuple[Prepared, Engine]:
    """The shape with random weights."""
    prepared = prepare_shape(SHAPE, EngineConfig(max_context=max_context))
    return prepared, assemble(prepared, random_fields(prepared.manifest, prepared.device, quiet))


def over_http() -> dict[str, Any]:
    """TPOT in process and through the server, in turns of the same engine; medians of five."""
    prepared, engine = made(4096)
    options = BenchOptions(isl=2048, osl=512)
    inside = [run(engine, options, number).tpot * 1e3 for number in range(6)][1:]
    config = build(ServerConfig, {"port": 0})
    worker = Worker(lambda: engine, max_queue=4)
    socket_of = server.bind(config)
    with socket_of as socket:
        port = socket.getsockname()[1]
        service = server.Service(
            worker=worker, tokenizer=None, model_name="shape", max_context=prepared.memory.max_context,
            vocab_size=prepared.config.vocab_size, end_ids=prepared.end_ids, sampling_defaults={},
        )  # fmt: skip
        outside: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: asked(port, prepared.config.vocab_size, outside), daemon=True)
        thread.start()
        server.serve(config, service, socket)
    tpot = statistics.median(one["tpot_ms"] for one in outside[1:])
    within = statistics.median(inside)
    return {
        "in_process_ms": within,
        "http_ms": tpot,
        "ratio": tpot / within,
        "requests": outside,
        "inside": inside,
    }


def asked(port: int, vocab: int, results: list[dict[str, Any]]) -> None:
    """Six requests of another process, and then the end of the server."""
    try:
        wait_ready(port)
        for number in range(6):
            random = torch.Generator().manual_seed(number)
            prompt = torch.randint(0, vocab, (2048,), generator=random).tolist()
            done = subprocess.run(
                [sys.executable, "-c", CLIENT, str(port), "512"],
                input=json.dumps(prompt), capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                print(done.stderr[-2000:], flush=True)
            results.append(json.loads(done.stdout))
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def wait_ready(port: int) -> None:
    """Until /health is 200."""
    for _ in range(200):
        try:
            link = http.client.HTTPConnection("127.0.0.1", port)
            link.request("GET", "/health")
            if link.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)


def long_run() -> dict[str, Any]:
    """8,192 tokens."""
    _, engine = made(16384)
    warm = BenchOptions(isl=64, osl=16)
    run(engine, warm, 0)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    tokens = 8192
    sampling = SamplingParams(max_tokens=tokens, temperature=1.0, seed=3, ignore_eos=True)
    prompt = tuple(torch.randint(0, 131072, (64,), generator=torch.Generator().manual_seed(1)).tolist())
    stamps: list[float] = []
    ids: list[int] = []
    for event in engine.generate(Request(prompt, sampling)):
        if isinstance(event, Token):
            stamps.append(time.perf_counter())
            ids.append(event.id)
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "tokens": len(ids),
        "tpot_first_1000_ms": 1e3 * (stamps[1000] - stamps[0]) / 1000,
        "tpot_last_1000_ms": 1e3 * (stamps[-1] - stamps[-1001]) / 1000,
        "allocated_change": torch.cuda.memory_allocated() - before,
        "free_change": torch.cuda.mem_get_info()[0] - free,
        "finite": bool(torch.isfinite(engine.buffers.logits).all()),
    }
    again = [event for event in engine.generate(Request(prompt, sampling)) if isinstance(event, Token)]
    result["same_again"] = [event.id for event in again] == ids
    return result


def same_tokens() -> dict[str, Any]:
    """Of the shape and of the demonstration model: 256 tokens after a prompt of 300, three ways of sampling."""
    result: dict[str, Any] = {}
    shape = prepare_shape(SHAPE, EngineConfig(max_context=1024))
    demo = prepare(open_checkpoint(DEMO_MODEL), EngineConfig(max_context=1024))
    weights = {
        SHAPE: (shape, random_fields(shape.manifest, shape.device, quiet)),
        "demo": (demo, load(demo.checkpoint, demo.manifest, demo.device, quiet)),
    }
    for name, (prepared, fields) in weights.items():
        eager, graph = (
            assemble(replace(prepared, options=replace(prepared.options, decode=how)), fields)
            for how in ("eager", "graph")
        )
        prompt = tuple(range(100, 400))
        for kind, sampling in SAMPLINGS.items():
            request = Request(prompt, SamplingParams(max_tokens=256, ignore_eos=True, **sampling))
            one, other = (
                [event.id for event in engine.generate(request) if isinstance(event, Token)]
                for engine in (eager, graph)
            )
            result[f"{name}, {kind}"] = {"same": one == other, "different_ids": len(set(one))}
    return result


def drift() -> dict[str, float]:
    """The demonstration model: 8,192 tokens decoded, against a prefill of the same in chunks.

    With random weights it says nothing: roundings change which experts are chosen, and KL is 0.5 from the first
    hundreds of tokens on.

    Beside it the same for its first 512 tokens: rounding differs between the two ways from the first token on, and
    a drift would grow.
    """
    prepared = prepare(open_checkpoint(DEMO_MODEL), EngineConfig(max_context=8400))
    engine = load_engine(prepared, quiet)
    sampling = SamplingParams(max_tokens=8192, temperature=1.0, seed=3, ignore_eos=True)
    ids = [event.id for event in engine.generate(Request((1, 5, 9), sampling)) if isinstance(event, Token)]
    result: dict[str, float] = {}
    for count in (512, 2048, len(ids)):
        decoded, prefilled = (by(engine, ids[:count]) for by in (decoded_logits, prefilled_logits))
        left, right = (torch.log_softmax(logits, -1) for logits in (decoded, prefilled))
        result[f"kl_{count}"] = (right.exp() * (right - left)).sum().item()
        result[f"relative_{count}"] = ((decoded - prefilled).norm() / prefilled.norm()).item()
    return result


@torch.inference_mode()
def decoded_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Of the last token, every token by a decode step."""
    with engine.cache.sequence(len(ids) + 8) as sequence:
        engine.buffers.positions.zero_()
        for id in ids:
            engine.buffers.ids.fill_(id)
            engine.decoder.advance(sequence)
        torch.cuda.synchronize()
        return engine.buffers.logits.clone()


@torch.inference_mode()
def prefilled_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Of the last token, in chunks."""
    device = engine.buffers.ids.device
    with engine.cache.sequence(len(ids) + 8) as sequence:
        hidden = torch.empty(0)
        for start in range(0, len(ids), engine.prefill_chunk):
            chunk = torch.tensor(ids[start : start + engine.prefill_chunk], device=device)
            hidden = prefill(engine.model, engine.cache, sequence, chunk)
        return engine.model.logits(hidden[-1:])[0].clone()


def by_context() -> dict[str, Any]:
    """TPOT at both ends, and what the bytes between them take."""
    _, engine = made(36864)
    bandwidth = read_bandwidth(torch.device("cuda"))
    result: dict[str, Any] = {"bandwidth_tb_s": bandwidth / 1e12}
    for isl in (2048, 32768):
        options = BenchOptions(isl=isl, osl=512)
        tpots = [run(engine, options, number).tpot * 1e3 for number in range(4)][1:]
        size = sum(token_traffic(engine, options.context).values())
        result[str(isl)] = {"tpot_ms": statistics.median(tpots), "bytes": size, "all": tpots}
    short, far = result["2048"], result["32768"]
    extra = (far["bytes"] - short["bytes"]) / bandwidth * 1e3
    return result | {"extra_bytes_ms": extra, "slowdown": far["tpot_ms"] / (short["tpot_ms"] + extra)}


def main() -> None:
    """What was asked for."""
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "http": over_http,
        "long": long_run,
        "context": by_context,
        "drift": drift,
        "same": same_tokens,
    }
    commit, out, wanted = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or list(works)
    rows: dict[str, Any] = {"commit": commit, "shape": SHAPE, "device": torch.cuda.get_device_name()}
    for name in wanted:
        begin = time.monotonic()
        rows[name] = works[name]()
        torch.cuda.empty_cache()
        short = {key: value for key, value in rows[name].items() if not isinstance(value, list)}
        print(f"{name} ({time.monotonic() - begin:.0f} s): {json.dumps(short)}", flush=True)
        (out / f"rows_{SHAPE}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
