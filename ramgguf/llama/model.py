"""llama.cpp in this process: load a model, tokenize, decode, read logits where they lie."""

import ctypes
import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ramgguf.core.closing import Closing
from ramgguf.core.errors import EngineError
from ramgguf.llama.kind import POOLINGS, KindError, ModelKind, kind_of
from ramgguf.llama.protocol import ModelInfo, TokenIds, VocabInfo
from ramgguf.llama.system import llama_module, nextn_module

Logits = npt.NDArray[np.float32]

_MAX_CHUNK = 512
_CHUNK_BYTES = 128 << 20  # of logits: 512 tokens up to a vocabulary of 65,536, then fewer


def chunk_size(n_ctx: int, n_vocab: int) -> int:
    """Return how many tokens are decoded at a time, so that their logits take ≤ 128 MiB."""
    fits = _CHUNK_BYTES // (4 * n_vocab)
    return max(1, min(n_ctx, _MAX_CHUNK, fits - fits % 32 if fits >= 32 else fits))


class Vocab:
    """A loaded model's tokenizer."""

    def __init__(self, llama: ModuleType, model: Any) -> None:
        self._llama = llama
        self._vocab = llama.llama_model_get_vocab(model)
        self.n_tokens: int = llama.llama_vocab_n_tokens(self._vocab)

    @cached_property
    def info(self) -> VocabInfo:
        """BOS, and a hash over the tokenizer's type and all token texts."""
        llama, vocab = self._llama, self._vocab
        digest = hashlib.sha256(b"%d" % llama.llama_vocab_type(vocab))
        for token in range(self.n_tokens):
            text: bytes = llama.llama_vocab_get_text(vocab, token)
            digest.update(b" %d " % len(text) + text)
        return VocabInfo(
            n_tokens=self.n_tokens,
            bos=llama.llama_vocab_bos(vocab),
            adds_bos=llama.llama_vocab_get_add_bos(vocab),
            sha256=digest.hexdigest(),
        )

    def tokenize(self, text: bytes, *, add_special: bool, control_tokens: bool = False) -> TokenIds:
        """Return the text's token ids.

        add_special lets the tokenizer add what it adds to a prompt (BOS, EOS). Control tokens
        written in the text are plain text, unless control_tokens says that they are meant.
        """
        room = len(text) + 8
        ids = np.empty(room, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        n = self._llama.llama_tokenize(
            self._vocab, text, len(text), pointer, room, add_special, control_tokens
        )
        if n < 0:
            raise EngineError(f"the tokenizer failed on {len(text)} bytes of text (code {n})")
        return ids[:n].copy()

    def piece(self, token: int) -> bytes:
        """Return the text of a token; control tokens have none."""
        buffer = ctypes.create_string_buffer(512)
        n = self._llama.llama_token_to_piece(self._vocab, token, buffer, 512, 0, False)
        return buffer.raw[:n] if n > 0 else b""

    @cached_property
    def _ends_generation(self) -> npt.NDArray[np.bool_]:
        llama, vocab = self._llama, self._vocab
        return np.array([llama.llama_vocab_is_eog(vocab, i) for i in range(self.n_tokens)], bool)

    def ends_generation(self, ids: TokenIds) -> npt.NDArray[np.bool_]:
        """Return whether each token ends what a model generates."""
        return self._ends_generation[ids]

    def ends(self, ids: TokenIds, n_bytes: int) -> npt.NDArray[np.int64]:
        """Return where in a text of n_bytes each of its tokens ends.

        A tokenizer that puts a space in front of the text makes it one byte longer; for one that
        rewrites its text, the positions are approximate.
        """
        unique, inverse = np.unique(ids, return_inverse=True)
        lengths = np.array([len(self.piece(int(t))) for t in unique], dtype=np.int64)
        ends = np.cumsum(lengths[inverse]) if len(ids) else np.zeros(0, dtype=np.int64)
        if len(ends) and ends[-1] == n_bytes + 1:
            ends = ends - 1
        return np.clip(ends, 0, n_bytes)


class LlamaModel(Closing):
    """A model with one context, for one sequence at a time. Use as a context manager.

    safe_kernels keeps llama.cpp from its extra buffer types (repacked weights, AMX), which crash
    on some CPUs; all weights are then read straight from the file's mapped pages. eval_callback
    (of a capture.Tap) is asked about every node of a graph that is computed. Raises KindError for a
    model that predicts no next token, unless any_kind: its logits are zeros, or another model's
    input. shards are loaded instead of the file at path, which then only names the model.
    takes_rows: decode takes rows of the first layer's input, of input_width numbers each, in place
    of tokens. drafts: blocks that draft tokens are loaded, too, and states tells
    what they read.
    """

    runs: ModelKind = "causal"

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_threads: int,
        safe_kernels: bool = False,
        verbose: bool = False,
        eval_callback: Any = None,
        any_kind: bool = False,
        shards: Sequence[Path] = (),
        takes_rows: bool = False,
        drafts: bool = False,
    ) -> None:
        self.path = path
        self.n_ctx = n_ctx
        self.n_threads = n_threads
        self._llama = llama = llama_module(verbose=verbose)
        self._model: Any = None
        self._held: Any = None  # the context
        self._batch: Any = None
        self._eval_callback = eval_callback  # must outlive the context
        if not shards and not path.is_file():
            raise EngineError(f"{path}: no such file")
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = not safe_kernels
        self._nextn = nextn_module(llama) if drafts else None
        if drafts:
            parameters.load_mtp = True
        names = [str(p).encode() for p in shards or (path,)]
        array = (ctypes.c_char_p * len(names))(*names)
        if len(names) > 1:
            self._model = llama.llama_model_load_from_splits(array, len(names), parameters)
        else:
            self._model = llama.llama_model_load_from_file(names[0], parameters)
        if not self._model:
            raise EngineError(
                f"{path}: llama.cpp cannot load it; run with -v to see why "
                f"(llama-cpp-python {llama.__version__})"
            )
        self.vocab = Vocab(llama, self._model)
        self.input_width: int = llama.llama_model_n_embd_inp(self._model)
        self._takes_rows = takes_rows
        self.n_batch = self._batch_size()
        self.decode_seconds = 0.0
        self._n_past = 0
        self._has_given_logits = any_kind
        try:
            self._open_context()
            found = kind_of(llama, self._model, self._context)
            if found != self.runs and not any_kind:
                raise KindError(path, found)
        except BaseException:
            self.close()
            raise

    def _batch_size(self) -> int:
        """Return how many tokens are decoded at a time."""
        return chunk_size(self.n_ctx, self.vocab.n_tokens)

    def _parameters(self) -> Any:
        """Return the parameters of the context."""
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = self.n_ctx
        # Every token of a chunk may have logits; the defaults reserve room for one per sequence.
        parameters.n_batch = parameters.n_ubatch = self.n_batch
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = self.n_batch
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        return parameters

    @property
    def _context(self) -> Any:
        """The context, opened again if it was freed to rest."""
        if self._held is None and self._model:
            self._open_context()
        return self._held

    def rest(self) -> None:
        """Free the context, with the sequence that it holds, until it is next used."""
        self._free_context()
        self._n_past = 0

    def new_context(self, **changed: Any) -> Any:
        """Return a context of the model, some of its parameters changed; None where llama.cpp makes
        none. It must be freed before the model is closed.
        """
        parameters = self._parameters()
        if self._eval_callback is not None:
            parameters.cb_eval = self._eval_callback
        for name, value in changed.items():
            setattr(parameters, name, value)
        return self._llama.llama_init_from_model(self._model, parameters) or None

    def _open_context(self) -> None:
        llama = self._llama
        self._held = self.new_context()
        if not self._held:
            raise EngineError(f"{self.path}: llama.cpp cannot make a context of {self.n_ctx}")
        if self._nextn is not None:
            self._nextn.llama_set_embeddings_nextn(self._held, True, False)
        width = self.input_width if self._takes_rows else 0
        self._batch = llama.llama_batch_init(self.n_batch, width, 1)
        if self._takes_rows:
            self._inputs = view(self._batch.embd, self.n_batch * width).reshape(-1, width)
        else:
            self._inputs = view(self._batch.token, self.n_batch)
        self._positions = view(self._batch.pos, self.n_batch)
        if self._takes_rows:
            # Where positions have sections (M-RoPE), those of rows are read one section after the
            # other: the same four times is what tokens get.
            self._own_positions = ctypes.addressof(self._batch.pos.contents)
            self._positions = np.zeros(4 * self.n_batch, np.int32)
            self._batch.pos = _int32s(self._positions.ctypes.data)
        self._wants_logits = view(self._batch.logits, self.n_batch)
        view(self._batch.n_seq_id, self.n_batch)[:] = 1
        for i in range(self.n_batch):
            self._batch.seq_id[i][0] = 0

    def close(self) -> None:
        """Free the context and the model; views of logits become invalid."""
        self._free_context()
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = None

    def _free_context(self) -> None:
        if self._batch is not None:
            if self._takes_rows:
                self._batch.pos = _int32s(self._own_positions)
            self._llama.llama_batch_free(self._batch)
        if self._held:
            self._llama.llama_free(self._held)
        self._batch = self._held = None

    @property
    def llama(self) -> ModuleType:
        """The low-level module of llama-cpp-python."""
        return self._llama

    @property
    def context(self) -> Any:
        """llama.cpp's context, opened if need be."""
        return self._context

    def states(self, n_tokens: int) -> Logits:
        """Return what blocks that draft read of the last chunk, (n_tokens, width): a copy.

        Raises EngineError where the model was not opened for drafts.
        """
        if self._nextn is None:
            raise EngineError(f"{self.path}: was not opened to draft tokens")
        return read_states(self._nextn, self._context, n_tokens, self.state_width)

    @property
    def state_width(self) -> int:
        """The numbers of a hidden state that tokens are drafted from."""
        width: int = self._llama.llama_model_n_embd_out(self._model)
        return width

    @property
    def handle(self) -> Any:
        """llama.cpp's model, for further contexts; they must be freed before it is closed."""
        return self._model

    @cached_property
    def info(self) -> ModelInfo:
        """What llama.cpp knows of the model."""
        buffer = ctypes.create_string_buffer(256)
        self._llama.llama_model_desc(self._model, buffer, 256)
        return ModelInfo(
            description=buffer.value.decode("utf-8", "replace"),
            n_ctx_train=self._llama.llama_model_n_ctx_train(self._model),
            vocab=self.vocab.info,
            pooling=POOLINGS.get(self._llama.llama_pooling_type(self._context), "none"),
        )

    def clear(self) -> None:
        """Forget the sequence: the next chunk starts at position 0."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._n_past = 0

    def rewind(self, n: int) -> int:
        """Forget all but the first n tokens of the sequence, or all; return how many are left.

        A model with a state, or with a window that has moved on, cannot go back.
        """
        llama, memory = self._llama, self._llama.llama_get_memory(self._context)
        if n >= self._n_past:
            return self._n_past
        whole = llama.llama_memory_seq_pos_min(memory, 0) == 0
        if n > 0 and whole and llama.llama_memory_seq_rm(memory, 0, n, -1):
            self._n_past = n
            return n
        self.clear()
        return 0

    def decode(
        self, tokens: npt.ArrayLike, *, first_output: int = 0, ends_early: bool = False
    ) -> Logits:
        """Return the logits (n, n_vocab) of a chunk's tokens from first_output on.

        With ends_early there are none: a callback ends the graph before they are computed.
        The chunk, of at most n_batch tokens, continues the sequence. The array is llama.cpp's own
        memory: it is valid until the next decode, clear or close; copy what must live longer.
        """
        inputs = np.asarray(tokens, dtype=np.float32 if self._takes_rows else np.int32)
        n = len(inputs)
        if not 0 < n <= self.n_batch or self._n_past + n > self.n_ctx:
            raise EngineError(
                f"{self.path}: a chunk of {n} tokens after {self._n_past} does not fit a batch of "
                f"{self.n_batch} and a context of {self.n_ctx}"
            )
        context = self._context
        self._put(inputs, first_output)
        start = time.perf_counter()
        code = self._llama.llama_decode(context, self._batch)
        if code != 0:
            raise EngineError(f"{self.path}: llama_decode failed with code {code}")
        self._n_past += n
        n_rows = 0 if ends_early else max(0, n - first_output)
        if n_rows == 0:
            self.decode_seconds += time.perf_counter() - start
            return np.empty((0, self.vocab.n_tokens), dtype=np.float32)
        pointer = self._llama.llama_get_logits(self._context)  # waits for the computation's end
        self.decode_seconds += time.perf_counter() - start
        if not pointer:
            raise EngineError(f"{self.path}: it gives no logits; is it a language model?")
        logits: Logits = np.ctypeslib.as_array(pointer, shape=(n_rows, self.vocab.n_tokens))
        if not self._has_given_logits:
            # A graph without an output leaves the buffer as it was: the same number everywhere.
            if (logits[0] == logits[0, 0]).all():
                raise EngineError(
                    f"{self.path}: it gives all tokens one logit, {logits[0, 0]:g}; "
                    "is it a language model?"
                )
            self._has_given_logits = True
        return logits

    def _put(self, inputs: npt.NDArray[Any], first_output: int) -> None:
        """Make ids, or rows, the batch; those from first_output on have outputs."""
        n = len(inputs)
        self._inputs[:n] = inputs
        positions = np.arange(self._n_past, self._n_past + n)
        if self._takes_rows:
            self._positions[: 4 * n] = np.tile(positions, 4)
        else:
            self._positions[:n] = positions
        self._wants_logits[:n] = np.arange(n) >= first_output
        self._batch.n_tokens = n

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield the bounds of the chunks in which a sequence of n_tokens is decoded."""
        for start in range(0, n_tokens, self.n_batch):
            yield start, min(start + self.n_batch, n_tokens)

    def sample(
        self,
        prompt: npt.ArrayLike,
        n_tokens: int,
        rng: np.random.Generator,
        *,
        temperature: float = 1.0,
    ) -> TokenIds:
        """Return n_tokens drawn from the model itself after the prompt (not part of the result).

        temperature 0 is greedy. The same generator state gives the same tokens on the same
        machine, build and thread count.
        """
        self.clear()
        logits: Logits | None = None
        ids = np.asarray(prompt, dtype=np.int32)
        for start, end in self.chunks(len(ids)):
            logits = self.decode(ids[start:end], first_output=end - start - 1)
        if logits is None:
            raise EngineError("sampling needs a prompt of at least one token, such as BOS")
        drawn = np.empty(n_tokens, dtype=np.int32)
        for i in range(n_tokens):
            drawn[i] = draw(logits[-1], rng, temperature)
            if i + 1 < n_tokens:
                logits = self.decode(drawn[i : i + 1])
        return drawn


def draw(logits: Logits, rng: np.random.Generator, temperature: float) -> int:
    """Return a token id drawn from softmax(logits / temperature); greedy at temperature 0."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    cumulative = np.cumsum(np.exp(scaled - scaled.max()))
    if not np.isfinite(cumulative[-1]):
        raise EngineError("nothing can be drawn: logits are NaN or infinite")
    found = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return min(int(found), len(logits) - 1)


def read_states(nextn: ModuleType, context: Any, n_tokens: int, width: int) -> Logits:
    """Return a copy of the hidden states (n_tokens, width) that the last decode made for drafts."""
    pointer = nextn.llama_get_embeddings_nextn(context)
    if not pointer:
        raise EngineError("llama.cpp gives no hidden states to draft tokens from")
    return np.array(view(pointer, n_tokens * width).reshape(n_tokens, width), np.float32)


def _int32s(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))


def view(pointer: Any, n: int) -> npt.NDArray[Any]:
    """Return an array over n values of llama.cpp's memory at the pointer."""
    array: npt.NDArray[Any] = np.ctypeslib.as_array(pointer, shape=(n,))
    return array
