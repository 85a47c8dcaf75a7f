"""A reference's logits in a file: read instead of its model, or saved while its model is scored."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.protocol import EvalProtocol, Tokens, Windows, llama_windows
from ramgguf.evaluate.result import LOGITS, ModelFile, Protocol
from ramgguf.llama.logits_file import Layout, LogitsFile, LogitsWriter
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.scorer import Scorer

_SAMPLED = 64  # windows whose first row is part of the file's identity


@dataclass(frozen=True)
class StoredLogits:
    """Files of logits of an evaluation. has_text: the user named the text that was scored.

    resume: what a file that is being saved has already is kept.
    """

    reference: LogitsFile | None = None
    save: Path | None = None
    has_text: bool = False
    resume: bool = False

    @property
    def reference_path(self) -> str | None:
        """The path of the reference's file, for workers."""
        return None if self.reference is None else str(self.reference.path)

    def check(self, protocol: EvalProtocol, n_vocab: int | None = None) -> None:
        """Raise EngineError where the reference's file is of other windows or another vocabulary"""
        if self.reference is None:
            return
        path, layout = self.reference.path, self.reference.layout
        if protocol.n_ctx not in (None, layout.n_ctx):
            raise EngineError(f"{path} has windows of {layout.n_ctx} tokens, not {protocol.n_ctx}")
        if n_vocab not in (None, layout.n_vocab):
            raise EngineError(
                f"{path} is of a vocabulary of {layout.n_vocab} tokens, the model has {n_vocab}: "
                "expected the logits of a model with the same tokenizer"
            )

    def windows(
        self, protocol: EvalProtocol, tokens: Tokens, scorer: Scorer
    ) -> tuple[Windows, Corpus]:
        """Return the windows of the reference's file, and the text that they are of.

        That is the protocol's text where its tokens are the file's, else the file's tokens as text.
        Raises EngineError for a text that the user named in vain.
        """
        assert self.reference is not None
        path, layout = self.reference.path, self.reference.layout
        n_ctx, corpus, ids = layout.n_ctx, protocol.corpus, self.reference.tokens
        n_seq = min(layout.n_windows, protocol.n_seq or layout.n_windows)
        if not np.array_equal(tokens.ids[: len(ids)], ids):
            if self.has_text:
                raise EngineError(_mismatch(path, corpus.name, ids, tokens.ids))
            text, ends = scorer.detokenize(ids)
            corpus = Corpus(f"the tokens of {path.name}", text.decode("utf-8", "replace"))
            tokens = Tokens(ids, ends, tokens.bos, tokens.adds_bos)
        cut = llama_windows(tokens, n_ctx=n_ctx, n_seq=n_seq, n_least=1)
        return Windows(cut.protocol, cut.windows, (*cut.notes, _note(path))), corpus

    def writer(self, protocol: Protocol, ids: TokenIds, n_vocab: int) -> LogitsWriter:
        """Return what writes the file of the protocol's windows, which are cut from ids."""
        assert self.save is not None
        layout = Layout(protocol.n_ctx, n_vocab, protocol.n_seq)
        tokens = ids[: layout.n_windows * layout.n_ctx]
        return LogitsWriter(self.save, layout, tokens, resume=self.resume)


NO_LOGITS = StoredLogits()


def identify_logits(file: LogitsFile) -> ModelFile:
    """Return what results say of a reference that is a file of logits."""
    layout, tokens = file.layout, file.tokens
    sample = hashlib.sha256()
    for window in np.unique(np.linspace(0, layout.n_windows - 1, _SAMPLED).astype(int)):
        rows = file.log_probabilities(int(window), layout.first_row, layout.first_row + 1)
        sample.update(rows.tobytes())
    return ModelFile(
        path=str(file.path),
        n_bytes=layout.n_bytes,
        header_sha256=hashlib.sha256(f"{layout}".encode() + tokens.tobytes()).hexdigest(),
        sample_sha256=sample.hexdigest(),
        architecture=LOGITS,
        file_type=LOGITS,
        n_weights=layout.n_vocab,
    )


def _mismatch(path: Path, text: str, ids: TokenIds, found: TokenIds) -> str:
    n = min(len(ids), len(found))
    differs = np.flatnonzero(ids[:n] != found[:n])
    at = int(differs[0]) if len(differs) else n
    return (
        f"{path} has other tokens than {text} from token {at} on: expected the text that it was "
        "made of; without --text, its own tokens are scored"
    )


def _note(path: Path) -> str:
    return (
        f"the reference is {path.name}: log-probabilities of 16 bits, none more than 16 nats below"
        " the largest, and KLD as llama-perplexity computes it, without tokens below e⁻¹⁶"
    )
