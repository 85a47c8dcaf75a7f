"""What the server answers to requests that are wrong: 400 and one line, which no client repeats.

llama-cpp-python answers most of them with 500, which clients take for an accident and send again,
and with the path of its own source file.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

Answer = tuple[int, dict[str, str | None]]


def answer_as_client_errors(errors: ModuleType) -> None:
    """Have the module that words llama-cpp-python's errors call wrong requests what they are."""
    from fastapi.exceptions import RequestValidationError

    handler = errors.RouteErrorHandler
    word: Callable[..., Answer] = handler.error_message_wrapper

    def word_all(self: Any, error: Exception, body: Any = None) -> Answer:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:])  # after "body"
            return _invalid(f"{where}: {first['msg']}", where)
        known = any(pattern.search(str(error)) for pattern in self.pattern_and_formatters)
        if isinstance(error, ValueError) and not known:
            return _invalid(str(error), None)
        return word(self, error, body)

    handler.error_message_wrapper = word_all


def _invalid(message: str, param: str | None) -> Answer:
    kind = "invalid_request_error"
    return 400, {"message": message, "type": kind, "param": param, "code": None}
