"""Every error a user can meet. The message names the field, the value and the remedy.

NanoserveError
├── ConfigError          our own options: command line, environment, TOML
├── CheckpointError      a file or tensor of the checkpoint is wrong (names file and tensor)
│   └── UnsupportedModel the checkpoint is sound, but this engine does not implement it
├── BackendError         a kernel backend that cannot run here was asked for by name
├── MemoryPlanError      weights, cache and workspace do not fit the device
├── RequestError         a request cannot be served as asked (HTTP 4xx)
│   ├── ContextLengthError   the prompt leaves no room in the context for an answer
│   └── QueueFull            too many requests wait (HTTP 503 with Retry-After)
└── EngineError          the engine failed; every waiting request is told (HTTP 500)
    ├── ServerUnreachable    a server that was to be asked is not there
    └── ServerBusy           it has no room now
"""


class NanoserveError(Exception):
    """Root of the tree. Command lines print ``str(error)`` on one line and exit with code 1."""


class ConfigError(NanoserveError):
    """An option is unknown, ill-typed or out of range."""


class CheckpointError(NanoserveError):
    """A checkpoint that cannot be loaded.

    Args:
        file: the file at fault, as its name inside the directory.
        problem: what is wrong and what to do about it.
        tensor: the tensor at fault, when there is one.
    """

    def __init__(self, file: str, problem: str, tensor: str | None = None) -> None:
        self.file, self.tensor, self.problem = file, tensor, problem
        place = f"{file}: {tensor}" if tensor else file
        super().__init__(f"{place}: {problem}")


class UnsupportedModel(CheckpointError):
    """The checkpoint asks for something that this engine does not implement."""


class BackendError(NanoserveError):
    """A backend chosen by name is unknown or cannot run on this device."""


class MemoryPlanError(NanoserveError):
    """The memory plan does not fit the device."""


class RequestError(NanoserveError):
    """A request that cannot be served as asked.

    Args:
        message: field, value and remedy in a sentence.
        param: the request field at fault, as the client spelled it.
        code: a stable machine-readable word (OpenAI's ``error.code``).
        status: the HTTP status that tells it.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = "invalid_value",
        status: int = 400,
    ) -> None:
        self.param, self.code, self.status = param, code, status
        super().__init__(message)


class ContextLengthError(RequestError):
    """The prompt does not fit the context, or leaves no room for an answer."""

    def __init__(self, prompt_tokens: int, max_context: int, *, param: str | None = "prompt") -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and the context holds {max_context}, "
            "which must also hold the answer: shorten the prompt or serve with a larger --max-context",
            param=param,
            code="context_length_exceeded",
        )


class QueueFull(RequestError):
    """Too many requests wait; ``retry_after`` is in whole seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(
            f"{waiting} requests are waiting and the queue is full: retry in {retry_after} s",
            code="queue_full",
            status=503,
        )


class EngineError(NanoserveError):
    """The engine failed or is not ready; the cause is in the server's log."""


class ServerUnreachable(EngineError):
    """Nobody listens at a server's address."""

    def __init__(self, where: str, cause: OSError) -> None:
        super().__init__(f"{where}: {cause.strerror or cause}: is the server running?")


class ServerBusy(EngineError):
    """A server that was asked has no room; ``retry_after`` is in whole seconds, as it said."""

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(f"{message} (Retry-After: {retry_after} s)")
