"""The llama protocol on a real model, against an implementation of its own in NumPy."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from ramgguf.core.corpus import default_corpus
from ramgguf.evaluate.evaluation import score_models
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.llama.model import LlamaModel

pytestmark = pytest.mark.real
N_WINDOWS = 2


def test_the_llama_protocol_gives_llama_perplexitys_value(smol768: Path) -> None:
    """What `llama-perplexity -m smol768-f16.gguf -f wikitext2-test.txt --chunks 2` prints.

    Written out from the definition: the file's text without its last newline, tokens with what the
    tokenizer adds, windows of 512, exp of the mean NLL of targets 257 … 511 of each.
    """
    protocol = EvalProtocol(protocol="llama", n_seq=N_WINDOWS)
    (result,) = score_models([smol768], protocol=protocol, threads=2).results
    nll: list[float] = []
    with LlamaModel(smol768, n_ctx=512, n_threads=2) as model:
        text = default_corpus().text.removesuffix("\n").encode()
        ids = model.vocab.tokenize(text, add_special=True)
        assert not model.vocab.info.adds_bos
        for start in range(0, N_WINDOWS * 512, 512):
            window = ids[start : start + 512]
            model.clear()
            logits = model.decode(window)
            for position in range(256, 511):
                row = logits[position].astype(np.float64)
                nll.append(float(logsumexp(row) - row[window[position + 1]]))
    assert len(nll) == result.n_scored == N_WINDOWS * 255
    ours = sum(s.nll_sum for s in result.sequences) / result.n_scored
    assert np.exp(ours) == pytest.approx(np.exp(np.mean(nll)), rel=1e-3)
    # llama.cpp's own value for these windows lies in the range of a 135M model on WikiText.
    assert 8 < np.exp(ours) < 30
    assert result.protocol.n_windows == len(ids) // 512
