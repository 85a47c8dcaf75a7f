"""The child process that runs llama.cpp: requests on stdin, responses on what was stdout.

llama.cpp can end its process (a failed assertion, a bad kernel); the parent lives on and knows
from the last Started which model and sequence it was. When the parent goes, stdin ends and so
does this process.
"""

import base64
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import numpy as np

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError, RamggufError
from ramgguf.llama.capture import Tap
from ramgguf.llama.child import queue_lines
from ramgguf.llama.embedding import EmbeddingModel
from ramgguf.llama.generation import generate_together
from ramgguf.llama.kind import KindError
from ramgguf.llama.likelihood import LikelihoodScorer
from ramgguf.llama.logits_file import LogitsFile
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.observer import Observer
from ramgguf.llama.protocol import (
    Collect,
    Detokenize,
    Detokenized,
    Divergences,
    Draw,
    Embed,
    Embedded,
    Failed,
    Generate,
    Generated,
    Keep,
    Likelihood,
    Likelihoods,
    Observe,
    Open,
    Opened,
    RequestAdapter,
    Score,
    Scored,
    Started,
    TapWeights,
    Tokenize,
    Tokenized,
    encode_bits,
    encode_float32,
    pack_ids,
    unpack_ids,
)
from ramgguf.llama.scoring import RowPass, SequenceRecords, StoredWindow, score_sequence
from ramgguf.llama.system import system_info

Send = Callable[[FrozenModel], None]


class Session:
    """The models that are loaded, and the answers to requests about them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._stack = ExitStack()
        self._models: list[LlamaModel] = []
        self._row_pass = RowPass(1)
        self._likelihoods: dict[int, LikelihoodScorer] = {}
        self._logits_files: dict[str, LogitsFile] = {}
        self.observer = Observer(send, self._under_tap)

    def open(self, request: Open) -> None:
        """Load the models and answer what they are."""
        self._request = request
        for number, path in enumerate(request.models):
            self._send(Started(model=number, index=None))
            first = request.models.index(path)
            if first < number:
                self._models.append(self._models[first])
                continue
            self._models.append(self._stack.enter_context(self._load(number)))
        self._row_pass = RowPass(request.n_threads)
        self._send(
            Opened(
                models=tuple(m.info for m in self._models),
                system=system_info(),
                n_batch=self._models[0].n_batch,
            )
        )

    def _load(self, number: int, tap: Tap | None = None, *, drafts: bool = False) -> LlamaModel:
        request = self._request
        loaded = EmbeddingModel if request.embeds else LlamaModel
        return loaded(
            Path(request.models[number]),
            n_ctx=request.n_ctx,
            n_threads=request.n_threads,
            safe_kernels=request.safe_kernels,
            verbose=request.verbose,
            eval_callback=tap.callback if tap else None,
            drafts=drafts,
        )

    def _under_tap(self, tap: Tap, drafts: bool) -> LlamaModel:
        self._models[0].rest()  # its logits and graphs would be held beside the tap's
        return self._load(0, tap, drafts=drafts)

    def draw(self, request: Draw) -> None:
        """Answer sequences that the first model draws."""
        self.observer.draw(self._models[0], request)

    def tokenize(self, request: Tokenize) -> None:
        """Answer a text's token ids and where they end."""
        vocab = self._models[request.model].vocab
        text = request.text.encode()
        ids = vocab.tokenize(
            text, add_special=request.add_special, control_tokens=request.control_tokens
        )
        self._send(Tokenized(ids=pack_ids(ids), ends=pack_ids(vocab.ends(ids, len(text)))))

    def detokenize(self, request: Detokenize) -> None:
        """Answer the tokens' text and where each ends in it."""
        vocab = self._models[request.model].vocab
        pieces = [vocab.piece(int(i)) for i in unpack_ids(request.ids)]
        ends = np.cumsum([len(p) for p in pieces])
        text = base64.b64encode(b"".join(pieces)).decode("ascii")
        self._send(Detokenized(text=text, ends=pack_ids(ends)))

    def generate(self, request: Generate) -> None:
        """Answer the first model's greedy continuations of the prompts."""
        start = time.perf_counter()
        prompts = [unpack_ids(p) for p in request.prompts]
        found = generate_together(self._models[0], prompts, request.n_tokens)
        seconds = time.perf_counter() - start
        self._send(Generated(ids=tuple(pack_ids(ids) for ids in found), seconds=seconds))

    def likelihood(self, request: Likelihood) -> None:
        """Answer a model's log-likelihoods of the ends of sequences."""
        self._send(Started(model=request.model, index=request.index))
        if request.model not in self._likelihoods:
            model = self._models[request.model]
            self._likelihoods[request.model] = LikelihoodScorer(model, self._row_pass)
        scorer = self._likelihoods[request.model]
        found = [
            scorer.score(unpack_ids(ids), n)
            for ids, n in zip(request.ids, request.n_scored, strict=True)
        ]
        values, greedy = zip(*found, strict=True)
        self._send(Likelihoods(values=values, greedy=greedy))

    def _logits_file(self, path: str | None) -> LogitsFile | None:
        if path is None:
            return None
        if path not in self._logits_files:
            self._logits_files[path] = LogitsFile(Path(path))
        return self._logits_files[path]

    def score(self, request: Score) -> None:
        """Answer each model's scores of a sequence."""
        stored = self._logits_file(request.reference_logits)
        saved = self._logits_file(request.save_logits)
        found = score_sequence(
            self._models,
            unpack_ids(request.ids),
            request.first_target,
            self._row_pass,
            has_reference=request.has_reference,
            stored=StoredWindow(stored, request.index) if stored else None,
            saved=StoredWindow(saved, request.index) if saved else None,
            on_model=lambda number: self._send(Started(model=number, index=request.index)),
        )
        for number, records in enumerate(found):
            self._send(summarize(number, request.index, records))

    def embed(self, request: Embed) -> None:
        """Answer each model's embedding of a text."""
        ids = unpack_ids(request.ids)
        for number, model in enumerate(self._models):
            self._send(Started(model=number, index=request.index))
            start = time.perf_counter()
            if not isinstance(model, EmbeddingModel):
                raise EngineError("no model was opened to embed; this is a bug of ramgguf")
            vector = encode_float32(model.embed(ids))
            seconds = time.perf_counter() - start
            self._send(Embedded(model=number, index=request.index, vector=vector, seconds=seconds))


def summarize(model: int, index: int, records: SequenceRecords) -> Scored:
    """Return the sums over a sequence's records; a sequence with broken targets has none."""
    scores, against = records.scores, records.divergences
    broken = own = (scores["broken"] if against is None else against["broken"]) != 0
    in_reference = False
    if against is not None:
        of_reference = against["reference"]["broken"] != 0
        # A pair of sound rows is broken where the model excludes what the reference does not.
        own = broken & ((against["candidate"]["broken"] != 0) | ~of_reference)
        in_reference = bool(of_reference.any())
    n_broken = int(np.count_nonzero(broken))
    divergences = None
    if against is not None and not n_broken:
        divergences = Divergences(
            reference_nll_sum=float(against["reference"]["nll"].sum()),
            kld_sum=float(against["kld"].sum()),
            kld_max=float(against["kld"].max()),
            n_same_top=int(against["same_top"].sum()),
            delta_p_sum=float(against["delta_p"].sum()),
            delta_p_squared_sum=float(np.square(against["delta_p"]).sum()),
            token_kld=encode_float32(against["kld"]),
            token_same_top=encode_bits(against["same_top"]),
            token_reference_nll=encode_float32(against["reference"]["nll"]),
        )
    return Scored(
        model=model,
        index=index,
        n_scored=len(scores),
        nll_sum=0.0 if n_broken else float(scores["nll"].sum()),
        token_nll="" if n_broken else encode_float32(scores["nll"]),
        divergences=divergences,
        n_broken=n_broken,
        first_broken=int(np.argmax(broken)),
        in_model=bool(own.any()) or not n_broken,
        in_reference=in_reference,
        seconds=records.seconds,
        decode_seconds=records.decode_seconds,
    )


def serve(lines: TextIO, out: TextIO) -> None:
    """Answer requests until lines end."""

    def send(message: FrozenModel) -> None:
        out.write(message.model_dump_json() + "\n")
        out.flush()

    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=queue_lines, args=(lines, requests), daemon=True).start()
    session = Session(send)
    while True:
        request = RequestAdapter.validate_json(requests.get())
        try:
            match request:
                case Open():
                    session.open(request)
                case Tokenize():
                    session.tokenize(request)
                case Detokenize():
                    session.detokenize(request)
                case Generate():
                    session.generate(request)
                case Likelihood():
                    session.likelihood(request)
                case Score():
                    session.score(request)
                case Embed():
                    session.embed(request)
                case Draw():
                    session.draw(request)
                case TapWeights():
                    session.observer.tap(request)
                case Observe():
                    session.observer.observe(request)
                case Keep():
                    session.observer.keep(request)
                case Collect():
                    session.observer.collect(request)
        except (RamggufError, MemoryError, ValueError) as e:
            message = str(e) if isinstance(e, EngineError) else f"{type(e).__name__}: {e}"
            kind = e.kind if isinstance(e, KindError) else None
            send(Failed(message=message, model_kind=kind))


def main() -> None:
    """Keep stdout for responses, and send what llama.cpp prints there to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, out)


if __name__ == "__main__":
    main()
