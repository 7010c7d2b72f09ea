"""What mscclpp.ext.ep raises. Every message carries the value, the limit and what to do."""

from typing import Any, Mapping


class EpError(RuntimeError):
    """Base of all errors of this package.

    Attributes:
        code: what went wrong, for callers that decide by kind: "invalidArgument", "invalidState",
            "timeout", "peerFailure", "outOfMemory", "unsupported", "system", "cuda", "internal".
        details: values beside the message: "rank" (peerFailure), "cuda_code" (cuda), "errno"
            (system).
    """

    code: str = "internal"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.details: dict[str, Any] = {}


class EpInvalidArgument(EpError, ValueError):
    """A value that the caller passed is outside what the function accepts."""

    code = "invalidArgument"


class EpInvalidState(EpError):
    """Right call, wrong moment: after destroy(), for example."""

    code = "invalidState"


class EpTimeout(EpError, TimeoutError):
    """A rank did not do in time what the others waited for; the message names it."""

    code = "timeout"


class EpPeerFailure(EpError):
    """Another rank died, left or failed. ``details["rank"]`` says which one."""

    code = "peerFailure"


class EpOutOfMemory(EpError, MemoryError):
    """Host, shared or device memory could not be had."""

    code = "outOfMemory"


class EpUnsupported(EpError, NotImplementedError):
    """This version, this build or this machine cannot do it."""

    code = "unsupported"


class EpSystemError(EpError):
    """A system call failed; ``details["errno"]`` is its error number."""

    code = "system"


class EpCudaError(EpError):
    """A CUDA call failed; ``details["cuda_code"]`` is the cudaError_t."""

    code = "cuda"


_BY_CODE = {cls.code: cls for cls in EpError.__subclasses__()}


def make_error(code: str, message: str, details: Mapping[str, Any]) -> EpError:
    """The exception for an error of the C++ library (which calls this); message untouched."""
    error = _BY_CODE.get(code, EpError)(message)
    error.code = code
    error.details = dict(details)
    return error
