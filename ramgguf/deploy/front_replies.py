"""OpenAI's forms of answers: whole, as events of a stream, and of errors."""

import abc
import json
import time
import uuid
from typing import Any


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's form of an error, in one line."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    line = " ".join(message.split())
    return {"error": {"message": line, "type": kind, "param": None, "code": code}}


class Reply(abc.ABC):
    """OpenAI's form of an answer."""

    object_name = stream_name = prefix = ""

    def __init__(self, alias: str, echo: str = "") -> None:
        self._alias, self._echo = alias, echo
        self._id = f"{self.prefix}-{uuid.uuid4()}"
        self._created = int(time.time())

    def _base(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._alias,
            "choices": choices,
        }

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    @abc.abstractmethod
    def _whole(self, text: str) -> dict[str, Any]: ...

    @abc.abstractmethod
    def _part(self, text: str) -> dict[str, Any]: ...

    def _end(self) -> dict[str, Any]:
        return self._part("")

    def whole(self, text: str, finished: Any) -> dict[str, Any]:
        """Return the answer in one."""
        choice = self._choice(self._whole(self._echo + text), finished.reason)
        return self._base(self.object_name, [choice]) | {"usage": _usage(finished)}

    def opening(self) -> list[dict[str, Any]]:
        """Return the events before the first piece."""
        return [self.piece(self._echo)] if self._echo else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return the event of a piece."""
        return self._base(self.stream_name, [self._choice(self._part(text), None)])

    def last(self, finished: Any) -> dict[str, Any]:
        """Return the event that says why the text ends."""
        return self._base(self.stream_name, [self._choice(self._end(), finished.reason)])

    def usage_event(self, finished: Any) -> dict[str, Any]:
        """Return the event that tells the numbers of tokens."""
        return self._base(self.stream_name, []) | {"usage": _usage(finished)}


class CompletionReply(Reply):
    """Of /v1/completions."""

    object_name = stream_name = "text_completion"
    prefix = "cmpl"

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    object_name, stream_name = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _end(self) -> dict[str, Any]:
        return {"delta": {}}

    def opening(self) -> list[dict[str, Any]]:
        delta = {"delta": {"role": "assistant"}}
        return [self._base(self.stream_name, [self._choice(delta, None)])]


def _usage(finished: Any) -> dict[str, int]:
    n_prompt, n_completion = finished.n_prompt, finished.n_completion
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
    }


def as_event(message: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(message)}\n\n"
