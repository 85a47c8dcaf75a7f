"""The engine's child process, its answers called for in this process and over the pipe."""

from pathlib import Path

import numpy as np
import pytest

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import (
    Open,
    Opened,
    Score,
    Scored,
    Started,
    Tokenize,
    Tokenized,
    pack_ids,
)
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
TEXT = "the quick brown fox jumps over the lazy dog"


def _untimed(scored: Scored) -> Scored:
    return scored.model_copy(update={"seconds": 0.0, "decode_seconds": 0.0})


def test_answers_are_those_that_come_over_the_pipe(tmp_path: Path) -> None:
    from ramgguf.llama.worker import Session

    models = (
        write_tiny_model(tmp_path / "base.gguf"),
        write_tiny_model(tmp_path / "m.gguf", seed=1),
    )
    ids = np.arange(3, 35, dtype=np.int32)
    with Engine(models, n_ctx=32, n_threads=1, safe_kernels=True) as engine:
        opened = engine.opened
        tokens, ends = engine.tokenize(TEXT, add_special=False)
        scored = list(engine.score(7, ids, 1, has_reference=True))
    sent: list[FrozenModel] = []
    session = Session(sent.append)
    paths = tuple(map(str, models))
    session.open(Open(models=paths, n_ctx=32, n_threads=1, safe_kernels=True, verbose=False))
    assert sent == [Started(model=0, index=None), Started(model=1, index=None), opened]
    sent.clear()
    session.tokenize(Tokenize(model=0, text=TEXT, add_special=False))
    assert sent == [Tokenized(ids=pack_ids(tokens), ends=pack_ids(ends))]
    sent.clear()
    session.score(Score(index=7, ids=pack_ids(ids), first_target=1, has_reference=True))
    assert [s for s in sent if isinstance(s, Started)] == [
        Started(model=0, index=7),
        Started(model=1, index=7),
    ]
    assert [_untimed(s) for s in sent if isinstance(s, Scored)] == [_untimed(s) for s in scored]
    assert isinstance(opened, Opened)


def test_broken_logits_are_counted_and_have_no_sums(tmp_path: Path) -> None:
    from ramgguf.llama.worker import Session

    model = write_tiny_model(tmp_path / "m.gguf", nan_in_output=True)
    sent: list[FrozenModel] = []
    session = Session(sent.append)
    session.open(
        Open(models=(str(model),), n_ctx=32, n_threads=1, safe_kernels=True, verbose=False)
    )
    ids = pack_ids(np.arange(3, 35, dtype=np.int32))
    session.score(Score(index=0, ids=ids, first_target=1, has_reference=False))
    scored = sent[-1]
    assert isinstance(scored, Scored)
    assert (scored.n_broken, scored.first_broken) == (31, 0)
    assert (scored.nll_sum, scored.token_nll, scored.divergences) == (0.0, "", None)
