"""A model class of lm-evaluation-harness: GGUF files by llama.cpp, in a child process.

lm_eval has no way to find models of other packages, so this module is its command line with
`ramgguf` among the models:

    python -m ramgguf.evaluate.lm_eval_model --model ramgguf --model_args pretrained=FILE.gguf \\
        --tasks hellaswag

From Python: lm_eval.simple_evaluate(model=RamggufLM("FILE.gguf"), tasks=[...]).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.evaluate.multiple_choice import N_CTX, encoded, prompt_ids
from ramgguf.gguf.hub import local_path
from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import TokenIds

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as e:
    raise EngineError(f"lm_eval cannot be imported ({e}); pip install 'ramgguf[tasks]'") from None

_GENERATED = 256  # tokens, where a task does not say


@register_model("ramgguf")
class RamggufLM(LM):  # type: ignore[misc]  # lm_eval is not typed for us
    """A GGUF file, at pretrained; n_ctx tokens of context, of which the last are kept."""

    def __init__(
        self,
        pretrained: str | Path,
        n_ctx: int = N_CTX,
        threads: int | None = None,
        safe_kernels: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self._n_ctx = int(n_ctx)
        self._engine = Engine(
            [local_path(pretrained)],
            n_ctx=self._n_ctx,
            n_threads=threads or default_threads(),
            safe_kernels=safe_kernels,
        )
        self._n_asked = 0

    def close(self) -> None:
        """End the child process."""
        self._engine.close()

    @property
    def _bos(self) -> int:
        return self._engine.opened.models[0].vocab.bos

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log p of each continuation after its context, and whether it is greedy."""
        found = []
        for request in requests:
            context, continuation = request.args
            ids, n = encoded(self._engine, context, continuation)
            found.append(self._score(ids[-self._n_ctx :], min(n, self._n_ctx - 1)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return log p of each text, in windows of the context's length; BOS before each."""
        return [sum(map(self._window, self._windows(request.args[0]))) for request in requests]

    def _windows(self, text: str) -> Iterator[TokenIds]:
        ids, _ = self._engine.tokenize(text, add_special=False)
        for start in range(0, len(ids), self._n_ctx - 1):
            part = ids[start : start + self._n_ctx - 1]
            before = ids[start - 1] if start else self._bos
            yield np.concatenate([np.array([before], np.int32), part]) if before >= 0 else part

    def _window(self, ids: TokenIds) -> float:
        return self._score(ids, len(ids) - 1)[0] if len(ids) > 1 else 0.0

    def _score(self, ids: TokenIds, n_scored: int) -> tuple[float, bool]:
        self._n_asked += 1
        return self._engine.likelihoods(self._n_asked, [(ids, n_scored)])[0]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return greedy continuations, each up to the first of its stops."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
            raise EngineError("this model class generates greedily; set temperature=0")
        n_tokens = int(settings.get("max_gen_toks", _GENERATED))
        ids = prompt_ids(self._engine, context)
        if not len(ids):
            ids = np.array([max(self._bos, 0)], np.int32)
        found, _ = self._engine.generate([ids[-max(1, self._n_ctx - n_tokens) :]], n_tokens)
        text = self._engine.detokenize(found[0])[0].decode("utf-8", "replace")
        stops = settings.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0] if stop else text
        return text


def main() -> None:
    """Run lm_eval's own command line, which now has the model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
