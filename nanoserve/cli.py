"""``nanoserve run | chat | generate | inspect | eval | bench | doctor``: the composition root."""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from nanoserve import __version__
from nanoserve.bench_options import add_bench_options
from nanoserve.config import (
    DecodeChoice,
    DeviceChoice,
    DtypeChoice,
    EngineConfig,
    KvDtypeChoice,
    ServerConfig,
    parse_ops,
    read_toml,
)
from nanoserve.config import build as build_config
from nanoserve.doctor_options import add_doctor_options
from nanoserve.errors import ConfigError, NanoserveError
from nanoserve.eval_questions import DEFAULT_COUNT, TaskName
from nanoserve.files import DEMO_MODEL
from nanoserve.machine import configured
from nanoserve.signals import ENDING, Interrupt, hearing, leave

if TYPE_CHECKING:
    from nanoserve.startup import Prepared


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        Exit code: 0, 1 after a `NanoserveError` or a failed write (told on one line), 130 after Ctrl-C, which
        ends an evaluation with what it has, as other signals do (128 and their number).
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell, as by >&-
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # for good
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what a terminal may not be able to show
    try:
        code = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left, as `| head` does. Python would fail once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (NanoserveError, OSError) as error:
        print(f"nanoserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _run(options: argparse.Namespace) -> int:
    """Checkpoint → tokeniser → socket → memory plan → weights (in the worker) → HTTP."""
    from nanoserve import server
    from nanoserve.checkpoint import open_checkpoint
    from nanoserve.http_guard import check_origins
    from nanoserve.progress import LoadBar
    from nanoserve.request import sampling_defaults
    from nanoserve.startup import load_engine, prepare
    from nanoserve.tokenizer import Tokenizer
    from nanoserve.worker import Worker

    engine_options, server_options = _sections(options)
    check_origins(server_options)
    with ExitStack() as stack:
        stack.enter_context(hearing(leave, *ENDING, signal.SIGINT))  # `server.serve` has handlers of its own
        checkpoint = open_checkpoint(_model(options))
        defaults = sampling_defaults(checkpoint.generation_config)
        tokenizer = Tokenizer.load(checkpoint.directory)
        socket = stack.enter_context(server.bind(server_options))
        prepared = prepare(checkpoint, engine_options, _say)
        _announce(prepared, tokenizer is not None)
        bar = LoadBar("weights")
        worker = Worker(
            lambda: load_engine(prepared, bar, _say),
            max_queue=server_options.max_queue,
            hang_timeout=server.hang_timeout(server_options, prepared.device.type),
        )
        service = server.Service(
            worker=worker,
            tokenizer=tokenizer,
            model_name=server_options.served_model_name or checkpoint.name,
            max_context=prepared.memory.max_context,
            vocab_size=prepared.config.vocab_size,
            end_ids=prepared.end_ids,
            sampling_defaults=defaults,
        )
        code = server.serve(server_options, service, socket)
    return server.leave(code, worker)


def _model(options: argparse.Namespace) -> Path:
    """The MODEL given, or the one in the box."""
    if options.model is not None:
        return Path(options.model)
    _say("no MODEL given: the demonstration model in the box, a small Nemotron-H in the released Lightning format")
    return DEMO_MODEL


def _announce(prepared: "Prepared", has_tokenizer: bool) -> None:
    """What will run and what it will take, before a weight is read."""
    from nanoserve.kernels.table import describe
    from nanoserve.startup import cpu_threads

    _say(f"{prepared.checkpoint.directory}: {prepared.device.type}, activations {prepared.shape.conv_dtype}")
    for purpose, amount in prepared.memory.rows():
        _say(f"  {purpose:<16} {amount}")
    for line in describe(prepared.ops.report):
        _say(f"  ops              {line}")
    _say(f"  decode steps     {prepared.decode}")
    if (threads := cpu_threads(prepared)) is not None:
        _say(f"  CPU threads      {threads} (the fastest for a small model; OMP_NUM_THREADS is heard)")
    if prepared.manifest.skipped_mtp:
        count, skipped = prepared.manifest.skipped_mtp, prepared.manifest.skipped_mtp_bytes
        _say(f"  not read         {count} tensors of the MTP block, {skipped / 1e9:.3g} GB (no speculation yet)")
    if not has_tokenizer:
        _say("  no tokenizer.json: only prompts of token ids can be served, at /v1/completions")


def _chat(options: argparse.Namespace) -> int:
    from nanoserve.client import RemoteServer
    from nanoserve.terminal import chat

    key = _read_key(options.api_key_file) if options.api_key_file else None
    return chat(RemoteServer(options.url, build_config(ServerConfig, {"api_key": key}).api_key))


def _generate(options: argparse.Namespace) -> int:
    from nanoserve.checkpoint import open_checkpoint
    from nanoserve.local import LocalEngine, Prompt
    from nanoserve.progress import LoadBar
    from nanoserve.request import SamplingParams
    from nanoserve.startup import prepare
    from nanoserve.tokenizer import Tokenizer

    engine_options, _ = _sections(options)
    prompt: Prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")}
    SamplingParams(**{name: value for name, value in sampling.items() if value is not None})  # faults come early
    with ExitStack() as stack:
        stack.enter_context(hearing(leave, *ENDING))
        checkpoint = open_checkpoint(_model(options))
        tokenizer = Tokenizer.load(checkpoint.directory)
        if tokenizer is None:
            where = checkpoint.directory
            raise ConfigError(
                f"{where} has no tokenizer.json, and --prompt is text: use the Python API with token ids"
            )
        prepared = prepare(checkpoint, engine_options, _say)
        _announce(prepared, has_tokenizer=True)
        engine = stack.enter_context(LocalEngine(prepared, tokenizer, LoadBar("weights"), _say))
        if options.json:
            answer = engine.generate(prompt, **sampling)
            usage = {
                "prompt_tokens": answer.usage.prompt_tokens,
                "completion_tokens": answer.usage.completion_tokens,
            }
            fields = {"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
            print(json.dumps({**fields, "usage": usage}, ensure_ascii=False))
            return 0
        for delta in engine.stream(prompt, **sampling):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from nanoserve.checkpoint import open_checkpoint
    from nanoserve.inspection import inspect_checkpoint

    engine_options, _ = _sections(options)
    report = inspect_checkpoint(open_checkpoint(_model(options), weights=False), engine_options)
    print(json.dumps(report.data(), indent=1) if options.json else report.text())
    return 0


def _eval(options: argparse.Namespace) -> int:
    """Questions → candidates, one in memory at a time → how many are right, and how the candidates differ."""
    from nanoserve.eval_local import LocalCandidate, parse_spec
    from nanoserve.eval_questions import read_suite
    from nanoserve.eval_server import ServerCandidate
    from nanoserve.evaluation import KL_QUESTIONS, Candidate, evaluate

    if options.url and options.model:
        raise ConfigError(f"url is {options.url} and MODEL is {options.model}: give one of them")
    if options.kl_questions is not None and not options.kl:
        raise ConfigError(f"kl-questions is {options.kl_questions} and needs --kl")
    engine_options, server_options = _sections(options)
    origin = {name: getattr(options, name) for name in ("count", "seed", "length", "data")}
    suite = read_suite(options.task, **origin)
    interrupt = Interrupt()
    with hearing(interrupt.hear, *ENDING, signal.SIGINT):
        path: Path | None = None
        if options.url:
            first: Candidate = ServerCandidate(options.url, server_options.api_key)
        else:
            path = _model(options)
            first = LocalCandidate(path.resolve().name, path, engine_options, _announce)
        others = [parse_spec(spec, path, engine_options, _announce) for spec in options.against or ()]
        given = KL_QUESTIONS if options.kl_questions is None else options.kl_questions
        kl_questions = given if options.kl else None
        report = evaluate(suite, [first, *others], kl_questions=kl_questions, interrupt=interrupt)
    print(json.dumps(report.data(), ensure_ascii=False) if options.json else report.text())
    return 0 if interrupt.number is None else 128 + interrupt.number


def _bench(options: argparse.Namespace) -> int:
    from nanoserve.bench_command import run_bench

    with hearing(leave, *ENDING):
        return run_bench(options, _sections(options)[0], _announce)


def _doctor(options: argparse.Namespace) -> int:
    from nanoserve.doctor_command import run_doctor

    with hearing(leave, *ENDING):
        return run_doctor(options, _sections(options)[0])


def _sections(options: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    """Both config sections out of command line, environment and TOML."""
    toml = read_toml(options.config) if options.config else {}
    given = vars(options)

    def of(section: type[EngineConfig] | type[ServerConfig]) -> dict[str, object]:
        return {name: given[name] for name in section.__dataclass_fields__ if name in given}

    engine = of(EngineConfig) | {"ops": parse_ops(options.op) if options.op else None}
    server = of(ServerConfig)
    if given.get("api_key_file"):
        server["api_key"] = _read_key(options.api_key_file)
    engine_options, profile = configured(engine, toml.get("engine"))
    if profile is not None:
        _say(f"{profile.device}: profile {profile.name}")
    return engine_options, build_config(ServerConfig, server, toml=toml.get("server"))


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api-key-file {path}: {error}") from error
    if not key:
        raise ConfigError(f"api-key-file {path} is empty and must hold the key")
    return key


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanoserve", description="One Nemotron-H model, one GPU, one stream of tokens."
    )
    parser.add_argument("--version", action="version", version=f"nanoserve {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="run | chat | generate | inspect | eval | bench | doctor"
    )

    run = commands.add_parser("run", help="serve a checkpoint over HTTP")
    _model_argument(run)
    _engine_options(run)
    _calibrate_option(run)
    run.add_argument("--host", help="address to bind (default 127.0.0.1)")
    run.add_argument("--port", type=int, help="port to bind (default 8000; 0 takes a free one)")
    run.add_argument("--served-model-name", help="the model's name on the wire (default: the directory's)")
    run.add_argument("--api-key-file", type=Path, help="file with the API key (or NANOSERVE_API_KEY)")
    run.add_argument("--max-queue", type=int, help="requests that may wait (default 64)")
    run.add_argument(
        "--allowed-host", action="append", dest="allowed_hosts", help="Host header to answer besides local ones"
    )
    run.add_argument("--cors-origin", action="append", dest="cors_origins", help="browser origin that may call")
    run.add_argument("--log-json", action="store_true", default=None, help="log one JSON object a line")
    run.set_defaults(command=_run)

    chat = commands.add_parser("chat", help="talk to a running server in the terminal")
    chat.add_argument(
        "url", metavar="URL", nargs="?", default="http://127.0.0.1:8000/v1", help="default %(default)s"
    )
    chat.add_argument("--api-key-file", type=Path, help="file with the server's API key (or NANOSERVE_API_KEY)")
    chat.set_defaults(command=_chat)

    generate = commands.add_parser("generate", help="continue one prompt and exit")
    _model_argument(generate)
    _engine_options(generate)
    _calibrate_option(generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's message")
    generate.add_argument("--max-tokens", type=int, help="tokens to generate at most")
    generate.add_argument("--temperature", type=float, help="0 is greedy")
    generate.add_argument("--seed", type=int, help="same seed, same text")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    generate.set_defaults(command=_generate)

    inspect = commands.add_parser("inspect", help="layers, precision, memory plan; loads nothing")
    _model_argument(inspect, "checkpoint directory, or one with only its JSON files")
    _engine_options(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command=_inspect)

    _eval_options(commands.add_parser("eval", help="how many questions a model answers rightly, side by side"))

    bench = commands.add_parser("bench", help="speed at batch 1, against the time that the memory's bus takes")
    _model_argument(bench)
    _engine_options(bench)
    _calibrate_option(bench)
    add_bench_options(bench)
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="whether this machine's driver, packages and kernels are sound")
    _model_argument(doctor)
    _engine_options(doctor, only=("device", "dtype", "kv-dtype"))
    add_doctor_options(doctor)
    doctor.set_defaults(command=_doctor)
    return parser


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", choices=get_args(TaskName), help=" | ".join(get_args(TaskName)))
    _model_argument(parser)
    _engine_options(parser)
    _calibrate_option(parser)
    parser.add_argument(
        "--count", type=int, help=f"questions to ask (default {DEFAULT_COUNT}; gsm8k: all of the file)"
    )
    parser.add_argument("--seed", type=int, help="of the problems (default: the held-out one)")
    parser.add_argument("--length", type=int, metavar="TOKENS", help="recall: tokens of the text")
    parser.add_argument("--data", type=Path, metavar="FILE", help="gsm8k: the public test file, JSON lines")
    parser.add_argument(
        "--against",
        action="append",
        metavar="SPEC",
        help="another candidate, by what differs: model=DIR,device=…,dtype=…,kv-dtype=…,op:NAME=BACKEND "
        "(any of them; repeatable)",
    )
    parser.add_argument("--kl", action="store_true", help="compare next-token distributions and perplexity too")
    parser.add_argument(
        "--kl-questions",
        type=int,
        metavar="N",
        help="questions to compare distributions on (default 50), up to 1 GiB of them: 2,048 tokens at a "
        "vocabulary of 131,072",
    )
    parser.add_argument("--url", help="ask a running server instead of MODEL, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key-file", type=Path, help="file with the server's API key (or NANOSERVE_API_KEY)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(command=_eval)


def _model_argument(parser: argparse.ArgumentParser, text: str = "checkpoint directory") -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{text} (default: the demonstration model)")


def _calibrate_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-calibrate",
        action="store_false",
        dest="calibrate",
        default=None,
        help="run the shipped default of the experts' backends, and measure nothing at the first start on a card",
    )


def _engine_options(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    """Options of the engine; ``only`` some of them, and how backends are chosen, where nothing is served."""
    choices: Mapping[str, Any] = {
        "device": DeviceChoice,
        "dtype": DtypeChoice,
        "kv-dtype": KvDtypeChoice,
        "decode": DecodeChoice,
    }
    for name in only or choices:
        parser.add_argument(f"--{name}", choices=get_args(choices[name]), help="default auto")
    if only is None:
        parser.add_argument("--max-context", type=int, help="tokens of prompt and answer (default: what fits)")
    parser.add_argument("--op", action="append", metavar="NAME=BACKEND", help="choose an op's backend; repeatable")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with [engine] and [server]")
