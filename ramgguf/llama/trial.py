"""The child process in which a model is tried as it will be deployed: loaded, filled, timed, asked.

Weights are read, not mapped, so that what the process holds is what the model needs. The parent
sends one step after the other, and knows at which of them llama.cpp or a limit ended it.
"""

import os
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.llama.breakdown import memory_breakdown
from ramgguf.llama.chat_template import questions
from ramgguf.llama.child import answer_requests
from ramgguf.llama.kind import kind_of, run_batch
from ramgguf.llama.limits import limit_data, peak_bytes
from ramgguf.llama.model import Vocab, draw
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.sizes import N_BATCH, SizesOf, context_parameters
from ramgguf.llama.system import llama_module, system_info
from ramgguf.llama.trial_protocol import (
    Asked,
    Conversation,
    Fill,
    Filled,
    Load,
    Loaded,
    Rates,
    Scored,
    ScoreText,
    Talk,
    Time,
)

Row = npt.NDArray[np.float32]  # logits, one for each token of the vocabulary

_SCORED_AT_A_TIME = 16  # logits of more tokens would take memory that deployment does not need


class Deployed:
    """A model and a context with the parameters of llama.cpp's own programs.

    An embedding model gets a batch of the whole context, as llama-server gives it: texts are not
    embedded in parts.
    """

    def __init__(self, request: Load) -> None:
        self._llama = llama = llama_module()
        if request.limit is not None:
            limit_data(request.limit, request.n_threads)
        started = time.perf_counter()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = 1 if request.mapped else 0
        self._model: Any = llama.llama_model_load_from_file(os.fsencode(request.path), parameters)
        if not self._model:
            raise EngineError("llama.cpp could not load the weights")
        self.n_ctx, self.n_batch, self.n_threads = request.n_ctx, N_BATCH, request.n_threads
        sizes = SizesOf(
            path=request.path,
            n_ctx=request.n_ctx,
            n_seq=1,
            type_k=request.type_k,
            type_v=request.type_v,
        )
        context = context_parameters(llama, sizes)
        context.n_threads = context.n_threads_batch = request.n_threads
        self._context: Any = None
        self._open(context)
        self.kind = kind_of(llama, self._model, self._context)
        if self.embeds:
            self.n_ctx = min(self.n_ctx, llama.llama_model_n_ctx_train(self._model))
            self.n_batch = context.n_ctx = context.n_batch = context.n_ubatch = self.n_ctx
            context.embeddings = True
            llama.llama_free(self._context)
            self._open(context)
        self.load_seconds = time.perf_counter() - started
        self.vocab = Vocab(llama, self._model)
        self._batch: Any = llama.llama_batch_init(self.n_batch, 0, 1)
        self._n_past = 0

    def _open(self, parameters: Any) -> None:
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise EngineError(f"llama.cpp could not make a context of {parameters.n_ctx} tokens")

    def close(self) -> None:
        """Free the model and its context."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    @property
    def embeds(self) -> bool:
        """Whether it is an embedding model."""
        return self.kind == "embedding"

    def loaded(self) -> Loaded:
        """Return what was loaded, and how long it took."""
        buffers = memory_breakdown(self._llama, self._context) or ()
        return Loaded(
            seconds=self.load_seconds,
            weights=sum(b.weights for b in buffers),
            cache=sum(b.cache for b in buffers),
            compute=sum(b.compute for b in buffers),
            n_vocab=self.vocab.n_tokens,
            system=system_info(),
            kind_of_model=self.kind,
            n_ctx=self.n_ctx,
        )

    def clear(self) -> None:
        """Forget the sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._n_past = 0

    def decode(self, ids: TokenIds) -> Row:
        """Return the logits after the last of the tokens, which continue the sequence.

        They are llama.cpp's own memory, valid until the next call. An embedding model takes all
        tokens at once and gives no logits.
        """
        if self.embeds:
            return self._embed(ids)
        row: Row = np.empty(0, np.float32)
        for start in range(0, len(ids), N_BATCH):
            part = ids[start : start + N_BATCH]
            rows = self._decode(part, n_outputs=int(start + N_BATCH >= len(ids)))
            row = rows[-1] if len(rows) else row
        return row

    def nlls(self, ids: TokenIds) -> list[float]:
        """Return the negative log-likelihood in nats of each token after the first."""
        found: list[float] = []
        for start in range(0, len(ids) - 1, _SCORED_AT_A_TIME):
            part = ids[start : min(start + _SCORED_AT_A_TIME, len(ids) - 1)]
            for i, row in enumerate(self._decode(part, n_outputs=len(part))):
                wide = row.astype(np.float64)
                wide -= wide.max()
                found.append(float(np.log(np.exp(wide).sum()) - wide[ids[start + i + 1]]))
        return found

    def _embed(self, ids: TokenIds) -> Row:
        self._put(ids, n_outputs=len(ids))
        code = run_batch(self._llama, self._model, self._context, self._batch)
        if code != 0:
            raise EngineError(f"llama.cpp failed to embed {len(ids)} tokens ({code})")
        self._llama.llama_synchronize(self._context)
        return np.empty(0, np.float32)

    def _decode(self, ids: TokenIds, n_outputs: int) -> Row:
        n = len(ids)
        self._put(ids, n_outputs)
        code = self._llama.llama_decode(self._context, self._batch)
        if code != 0:
            raise EngineError(f"llama.cpp failed to decode after {self._n_past} tokens ({code})")
        self._n_past += n
        if n_outputs == 0:
            return np.empty((0, self.vocab.n_tokens), np.float32)
        pointer = self._llama.llama_get_logits(self._context)
        if not pointer:
            raise EngineError("it gives no logits; is it a language model?")
        return np.ctypeslib.as_array(pointer, shape=(n_outputs, self.vocab.n_tokens))

    def _put(self, ids: TokenIds, n_outputs: int) -> None:
        batch, n = self._batch, len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i] = int(token)
            batch.pos[i] = self._n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= n - n_outputs

    def tokens(self, text: str, *, special: bool) -> TokenIds:
        """Return the text's tokens; with special, control tokens written in it count as such."""
        if self._llama.llama_vocab_type(self._llama.llama_model_get_vocab(self._model)) == 0:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % self.vocab.n_tokens
        return tokenize(self._llama, self._model, text.encode(), special=special)

    def prompts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the tokens of users' messages, each alone, as the file's chat template has it."""
        template = self._llama.llama_model_chat_template(self._model, None)
        if not template:
            return [self.tokens(text, special=False) for text in texts]
        put = self._templated(template.decode("utf-8", "replace"), texts)
        return [self.tokens(text, special=True) for text in put]

    def _templated(self, template: str, texts: Sequence[str]) -> list[str]:
        llama, vocab = self._llama, self._llama.llama_model_get_vocab(self._model)
        bos, eos = (
            llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
            if token >= 0
            else ""
            for token in (llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab))
        )
        put = questions(template, bos, eos, texts)
        # The tokenizer adds BOS itself where the model wants one.
        adds_bos = bos and llama.llama_vocab_get_add_bos(vocab)
        return [text.removeprefix(bos) for text in put] if adds_bos else put

    def ends(self, token: int) -> bool:
        """Return whether the token ends an answer."""
        vocab = self._llama.llama_model_get_vocab(self._model)
        return bool(self._llama.llama_vocab_is_eog(vocab, token))


def tokenize(llama: ModuleType, model: Any, text: bytes, *, special: bool) -> TokenIds:
    """Return a text's tokens with what the tokenizer adds to a prompt."""
    import ctypes

    ids = np.empty(len(text) + 8, np.int32)
    pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    vocab = llama.llama_model_get_vocab(model)
    n = llama.llama_tokenize(vocab, text, len(text), pointer, len(ids), True, special)
    if n < 0:
        raise EngineError(f"the tokenizer failed on {len(text)} bytes of text (code {n})")
    return ids[:n].copy()


def fill(model: Deployed, request: Fill) -> Filled:
    """Decode text until the context is full but for n_generated tokens, and generate these."""
    n_generated = 0 if model.embeds else request.n_generated
    ids = np.resize(model.tokens(request.text, special=False), model.n_ctx - n_generated)
    model.clear()
    started = time.perf_counter()
    logits = model.decode(ids)
    seconds = time.perf_counter() - started
    rate = generate_rate(model, logits, n_generated) if n_generated else None
    return Filled(n_tokens=len(ids), seconds=seconds, generation=rate, peak_bytes=peak_bytes())


def generate_rate(model: Deployed, logits: Row, n_tokens: int) -> float:
    """Return the tokens per second of generating n_tokens greedily, whatever they are."""
    started = time.perf_counter()
    for _ in range(n_tokens):
        logits = model.decode(np.array([np.argmax(logits)], np.int32))
    return n_tokens / (time.perf_counter() - started)


def rates(model: Deployed, request: Time) -> Rates:
    """Return tokens per second of prompts and of generation after them, one for each repeat."""
    n_generated = 0 if model.embeds else request.n_generated
    n_prompt = max(1, min(request.n_prompt, model.n_ctx - n_generated))
    ids = np.resize(model.tokens(request.text, special=False), n_prompt)
    model.clear()
    generate_rate(model, model.decode(ids), min(1, n_generated))  # what is touched first is slow
    prompts, generations = [], []
    for _ in range(request.n_repeats):
        model.clear()
        started = time.perf_counter()
        logits = model.decode(ids)
        prompts.append(n_prompt / (time.perf_counter() - started))
        if n_generated:
            generations.append(generate_rate(model, logits, n_generated))
    return Rates(n_prompt=n_prompt, prompt=tuple(prompts), generation=tuple(generations))


def talk(model: Deployed, request: Talk) -> Conversation:
    """Return what the model answers to each prompt, and when its first token came."""
    rng = np.random.default_rng(request.seed)
    answers = []
    for prompt, ids in zip(request.prompts, model.prompts(request.prompts), strict=True):
        model.clear()
        started = time.perf_counter()
        room = model.n_ctx - len(ids)
        if room < 1:
            raise EngineError(f"a context of {model.n_ctx} tokens has no room for a prompt")
        logits = model.decode(ids)
        said: list[int] = [draw(logits, rng, request.temperature)]
        first_seconds = time.perf_counter() - started
        while not model.ends(said[-1]) and len(said) < min(request.n_tokens, room):
            logits = model.decode(np.array(said[-1:], np.int32))
            said.append(draw(logits, rng, request.temperature))
        ended = model.ends(said[-1])
        text = b"".join(model.vocab.piece(token) for token in said)
        answers.append(
            Asked(
                prompt=prompt,
                prompt_ids=tuple(int(i) for i in ids),
                ids=tuple(said),
                text_hex=text.hex(),
                ended=ended,
                first_seconds=first_seconds,
            )
        )
    return Conversation(answers=tuple(answers))


def score(model: Deployed, request: ScoreText) -> Scored:
    """Return the negative log-likelihood in nats of a text, or of tokens after others."""
    if request.text is not None:
        ids, first = model.tokens(request.text, special=False), 1
    else:
        ids, first = np.array(request.ids, np.int32), max(1, request.first)
    model.clear()
    nlls = np.array(model.nlls(ids[: model.n_ctx])[first - 1 :])
    return Scored(n_tokens=len(nlls), nll=float(nlls.sum()) if np.isfinite(nlls).all() else None)


def main() -> None:
    """Answer steps until the parent goes; the first one loads the model."""
    models: list[Deployed] = []

    def answer(request: Load | Fill | Time | Talk | ScoreText) -> FrozenModel:
        match request:
            case Load():
                models.append(Deployed(request))
                return models[0].loaded()
            case Fill():
                return fill(models[0], request)
            case Time():
                return rates(models[0], request)
            case Talk():
                return talk(models[0], request)
            case ScoreText():
                return score(models[0], request)

    answer_requests(REQUESTS, answer)


REQUESTS: TypeAdapter[Load | Fill | Time | Talk | ScoreText] = TypeAdapter(
    Annotated[Load | Fill | Time | Talk | ScoreText, Field(discriminator="kind")]
)


if __name__ == "__main__":
    main()
