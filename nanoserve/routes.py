"""The HTTP endpoints: each reads a body, has it checked off the event loop, and answers."""

import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from nanoserve import __version__, anthropic, responses
from nanoserve.answers import Generation, Job, Wire
from nanoserve.anthropic_answer import MessageWire
from nanoserve.chat import ChatCall, parse_chat, parse_conversation
from nanoserve.chat_answer import ChatWriter
from nanoserve.choice import AnswerFailed, ChatChoice, Choice
from nanoserve.completions import CompletionWriter, encode_prompt, parse_completion
from nanoserve.config import ServerConfig
from nanoserve.constraint import Constraints
from nanoserve.doors import Names, renaming
from nanoserve.errors import (
    ContextLengthError,
    NanoserveError,
    QueueFull,
    RequestError,
)
from nanoserve.http_guard import (
    Guard,
    JsonResponse,
    LingeringResponse,
    check_origins,
    error_body,
    read_body,
    request_id_of,
)
from nanoserve.metrics import Metrics
from nanoserve.openai_wire import OpenAiWire
from nanoserve.page import page
from nanoserve.parameters import Limits, choice_requests, parse_model
from nanoserve.protocol import Fields, checked_text, decode_json, error_answer, error_object, token_ids
from nanoserve.responses_answer import ResponseWire, settings_of
from nanoserve.structured import Held
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import Worker

PREPARATIONS = 2
"""Bodies parsed and tokenised at once; each may hold Python's lock for a while, and /health must answer."""

GRAMMARS = 8
"""Grammars looked at at once: more than are tried out, so that known ones pass and the others are turned away."""

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Result = TypeVar("_Result")
_Handler = Callable[[HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Service:
    """What is served.

    Attributes:
        worker: owns the engine; may still be loading.
        tokenizer: None serves prompts of token ids only.
        model_name: the model's name on the wire.
        max_context: tokens of prompt and answer together.
        vocab_size: token ids are below it.
        end_ids: the model's own end tokens.
        sampling_defaults: fields of `SamplingParams` that hold when a request leaves them out.
    """

    worker: Worker
    tokenizer: Tokenizer | None
    model_name: str
    max_context: int
    vocab_size: int
    end_ids: frozenset[int]
    sampling_defaults: Mapping[str, Any]


def create_app(config: ServerConfig, service: Service, address: str | None = None) -> Starlette:
    """The ASGI application.

    Args:
        config: limits, hosts and key.
        service: what is served.
        address: what the socket is bound to; None takes ``config.host``.

    Raises:
        ConfigError: the CORS origins hold a wildcard.
    """
    check_origins(config)
    metrics = Metrics()
    routes = Routes(config, service, metrics)
    app = Starlette(
        routes=routes.table(),
        middleware=[Middleware(Guard, config=config, metrics=metrics, address=address or config.host)],
        exception_handlers={NanoserveError: routes.on_error, HTTPException: on_http_error},
    )
    app.router.redirect_slashes = False
    return app


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    words = {404: f"{path} does not exist", 405: f"{request.method} is not a method of {path}"}
    message, code = words.get(error.status_code, error.detail), f"http_{error.status_code}"
    told = error_object(message, kind="invalid_request_error", code=code)
    body = error_body(request.scope, error.status_code, told)
    return JsonResponse(body, status_code=error.status_code, headers=error.headers)


class Routes:
    """The endpoints over one service."""

    def __init__(self, config: ServerConfig, service: Service, metrics: Metrics) -> None:
        self._config, self._service, self._metrics = config, service, metrics
        self._created = int(time.time())
        self._preparations = anyio.CapacityLimiter(PREPARATIONS)
        self._grammars = anyio.CapacityLimiter(GRAMMARS)
        self._making_constraints = threading.Lock()
        self._made_constraints: Constraints | None = None
        self._limits = Limits(
            service.model_name, service.vocab_size, service.sampling_defaults, service.tokenizer is not None
        )

    def table(self) -> list[Route]:
        """Path, handler and method of every endpoint."""
        get: dict[str, _Handler] = {
            "/": page(),
            "/health": self.health,
            "/metrics": self.metrics,
            "/version": self.version,
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
        }
        post: dict[str, _Handler] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/v1/messages": self.messages,
            "/v1/messages/count_tokens": self.count_tokens,
            "/v1/responses": self.responses,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        return [
            *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
            *(Route(path, handler, methods=["POST"]) for path, handler in post.items()),
        ]

    async def on_error(self, request: HttpRequest, error: Exception) -> Response:
        """Any of our errors as the error object of the path's interface."""
        assert isinstance(error, NanoserveError)
        status, told = error_answer(error)
        if isinstance(error, AnswerFailed):
            status = 500
        body = error_body(request.scope, status, told)
        if status in (408, 413):
            return LingeringResponse(body, status, request)
        response = JsonResponse(body, status_code=status)
        if status == 503:
            wait = error.retry_after if isinstance(error, QueueFull) else self._service.worker.retry_after()
            response.headers["retry-after"] = str(wait)
        return response

    async def health(self, request: HttpRequest) -> Response:
        """200 when requests are taken and answered, otherwise 503 with the worker's state."""
        if (reason := self._service.worker.hanging()) is not None:
            return JsonResponse({"status": "hanging", "reason": reason}, status_code=503)
        state = self._service.worker.state
        if state == "ready":
            return JsonResponse({"status": "ok"})
        return JsonResponse({"status": state}, status_code=503)

    async def metrics(self, request: HttpRequest) -> Response:
        """Prometheus' page."""
        worker = self._service.worker
        text = self._metrics.text(running=worker.running, waiting=worker.waiting)
        return Response(text, headers={"content-type": _METRICS_TYPE})

    async def version(self, request: HttpRequest) -> Response:
        """The engine's version."""
        return JsonResponse({"version": __version__})

    async def models(self, request: HttpRequest) -> Response:
        """The one model, in a list."""
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """The one model."""
        parse_model(Fields({"model": request.path_params["model"]}), self._service.model_name)
        return JsonResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "nanoserve",
            "max_model_len": self._service.max_context,
        }

    async def chat(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, self._prepare_chat)

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, self._prepare_completion)

    async def messages(self, request: HttpRequest) -> Response:
        """POST /v1/messages."""
        return await self._generate(request, self._prepare_message, anthropic.NAMES)

    async def count_tokens(self, request: HttpRequest) -> Response:
        """POST /v1/messages/count_tokens."""
        return JsonResponse({"input_tokens": await self._prepare(request, self._count_tokens)})

    async def responses(self, request: HttpRequest) -> Response:
        """POST /v1/responses."""
        return await self._generate(request, self._prepare_response, responses.NAMES)

    async def tokenize(self, request: HttpRequest) -> Response:
        """Token ids of a prompt or of a chat."""
        return await self._prepare(request, self._tokenize)

    async def detokenize(self, request: HttpRequest) -> Response:
        """Text of token ids."""
        return await self._prepare(request, self._detokenize)

    async def _prepare(self, request: HttpRequest, work: Callable[[dict[str, Any], str], _Result]) -> _Result:
        """Read the body, then parse it and do the work in a thread."""
        body = await read_body(request, self._config)
        request_id = request_id_of(request.scope)

        def job() -> _Result:
            try:
                return work(decode_json(body), request_id)
            except RecursionError as error:  # a net: what reads nested values says so itself, and better
                raise RequestError("the body is nested too deeply") from error

        return await anyio.to_thread.run_sync(job, limiter=self._preparations)

    async def _generate(
        self,
        request: HttpRequest,
        prepare: Callable[[dict[str, Any], str], tuple[Job, Held]],
        names: Names = (),
    ) -> Response:
        self._service.worker.admit()  # before any work is spent on it
        job, held = await self._prepare(request, prepare)
        if held.grammar is not None or held.budget is not None:
            # Trying a grammar out takes seconds where it is hostile: nobody else's body may wait for that.
            hold = partial(self._hold, job, held)
            with renaming(names):
                job = await anyio.to_thread.run_sync(hold, limiter=self._grammars)
        return Generation(job, self._service.worker, self._config.ping_interval)

    def _hold(self, job: Job, held: Held) -> Job:
        """The job with every answer held to what was asked."""
        of = partial(
            self._constraints().of,
            grammar=held.grammar,
            thinking_budget=held.budget,
            param=held.param,
            budget_param="thinking_token_budget",
        )
        make = cache(of)  # once a prompt, however many choices it has
        return replace(job, requests=[replace(one, constraint=make(one.prompt)) for one in job.requests])

    def _constraints(self) -> Constraints:
        with self._making_constraints:  # once, and not at the start: 0.8 s for 131,072 tokens
            if self._made_constraints is None:
                tokenizer = self._tokenizer("response_format")
                self._made_constraints = Constraints(tokenizer, self._service.vocab_size, self._service.end_ids)
            return self._made_constraints

    def _prepare_chat(self, body: dict[str, Any], request_id: str) -> tuple[Job, Held]:
        call = parse_chat(body, self._limits)
        writer = ChatWriter(self._head("chatcmpl"), self._tokenizer("messages"), call)
        return self._chat_job(call, request_id, lambda n: OpenAiWire(writer, call.delivery, n))

    def _prepare_message(self, body: dict[str, Any], request_id: str) -> tuple[Job, Held]:
        chat = anthropic.chat_body(body)
        with renaming(anthropic.NAMES):
            call = parse_chat(chat, self._limits)
            most = call.sampling.max_tokens or 0
            wire = MessageWire(request_id, f"msg_{uuid.uuid4().hex}", self._service.model_name, most)
            return self._chat_job(call, request_id, lambda n: wire)

    def _count_tokens(self, body: dict[str, Any], request_id: str) -> int:
        chat = anthropic.chat_body(body, counting=True)
        with renaming(anthropic.NAMES):
            call = parse_chat(chat, self._limits)
            return len(call.conversation.encode(self._tokenizer("messages")))

    def _prepare_response(self, body: dict[str, Any], request_id: str) -> tuple[Job, Held]:
        chat = responses.chat_body(body)
        with renaming(responses.NAMES):
            call = parse_chat(chat, self._limits)
            wire = ResponseWire(self._head("resp", "_"), settings_of(body, call))
            return self._chat_job(call, request_id, lambda n: wire)

    def _chat_job(self, call: ChatCall, request_id: str, wire: Callable[[int], Wire]) -> tuple[Job, Held]:
        """Encode a chat; ``wire`` gets the number of tokens that the engine will read."""
        tokenizer = self._tokenizer("messages")
        prompt = call.conversation.encode(tokenizer)
        if len(prompt) >= self._service.max_context:
            raise ContextLengthError(len(prompt), self._service.max_context, param="messages")
        reading = call.reading(tokenizer, prompt)
        requests = choice_requests([prompt], call.sampling, call.delivery.choices, request_id)
        choices = [ChatChoice(i, reading, tokenizer) for i in range(len(requests))]
        read = len(prompt) * len(requests)
        return Job(requests, choices, wire(read), len(prompt), call.delivery.stream), call.held

    def _prepare_completion(self, body: dict[str, Any], request_id: str) -> tuple[Job, Held]:
        call = parse_completion(body, self._limits)
        tokenizer = self._service.tokenizer
        prompts = [encode_prompt(prompt, tokenizer) for prompt in call.prompts]
        requests = choice_requests(prompts, call.sampling, call.delivery.choices, request_id)
        choices = [Choice(i, call.sampling.stop, tokenizer) for i in range(len(requests))]
        writer = CompletionWriter(self._head("cmpl"), tokenizer, call, prompts)
        wire = OpenAiWire(writer, call.delivery, sum(len(request.prompt) for request in requests))
        return Job(requests, choices, wire, sum(map(len, prompts)), call.delivery.stream), call.held

    def _head(self, prefix: str, mark: str = "-") -> dict[str, Any]:
        """What is the same in every chunk of an answer."""
        name = f"{prefix}{mark}{uuid.uuid4().hex}"
        return {"id": name, "created": int(time.time()), "model": self._service.model_name}

    def _tokenizer(self, param: str) -> Tokenizer:
        if self._service.tokenizer is None:
            message = "this checkpoint has no tokenizer: send prompts of token ids to /v1/completions"
            raise RequestError(message, param=param)
        return self._service.tokenizer

    def _tokenize(self, body: dict[str, Any], request_id: str) -> Response:
        """The whole answer, made where the body is read: millions of ids would hold up the event loop."""
        fields = Fields(body)
        parse_model(fields, self._service.model_name)
        if (text := fields.take("prompt")) is not None:
            special = fields.boolean("add_special_tokens", default=True)
            fields.done()
            checked = checked_text(text, "prompt")
            ids = self._tokenizer("prompt").encode(checked, add_special_tokens=special)
        else:
            conversation = parse_conversation(fields)
            fields.done()
            ids = list(conversation.encode(self._tokenizer("messages")))
        return JsonResponse({"count": len(ids), "max_model_len": self._service.max_context, "tokens": ids})

    def _detokenize(self, body: dict[str, Any], request_id: str) -> Response:
        fields = Fields(body)
        parse_model(fields, self._service.model_name)
        ids = token_ids(fields.take("tokens"), "tokens", self._service.vocab_size)
        fields.done()
        return JsonResponse({"prompt": self._tokenizer("tokens").decode(ids, skip_special=False)})
