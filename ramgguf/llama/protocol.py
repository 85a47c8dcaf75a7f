"""The messages between `client` and `worker`: one JSON object per line."""

import base64
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.core.values import TokenKind
from ramgguf.llama.kind import ModelKind

TokenIds = npt.NDArray[np.int32]


class Open(FrozenModel):
    """Load the models, to predict tokens or to embed texts; answered by Opened."""

    kind: Literal["open"] = "open"
    models: tuple[str, ...]
    n_ctx: int
    n_threads: int
    safe_kernels: bool
    verbose: bool
    embeds: bool = False


class Tokenize(FrozenModel):
    """Tokenize a text with one model's tokenizer; answered by Tokenized."""

    kind: Literal["tokenize"] = "tokenize"
    model: int
    text: str
    add_special: bool
    control_tokens: bool = False


class Score(FrozenModel):
    """Score a sequence with every model; answered by Started and Scored for each.

    With has_reference, model 0 is the reference of the others. Targets first_target … are scored.
    reference_logits is a file (logits_file.py) whose window `index` is the reference of all;
    save_logits one that takes model 0's.
    """

    kind: Literal["score"] = "score"
    index: int
    ids: str
    first_target: int
    has_reference: bool
    reference_logits: str | None = None
    save_logits: str | None = None


class Detokenize(FrozenModel):
    """Ask for the text of a model's tokens; answered by Detokenized."""

    kind: Literal["detokenize"] = "detokenize"
    model: int
    ids: str


class Generate(FrozenModel):
    """Continue prompts greedily with the first model, side by side; answered by Generated."""

    kind: Literal["generate"] = "generate"
    prompts: tuple[str, ...]
    n_tokens: int


class Likelihood(FrozenModel):
    """Ask a model for log p of the last n_scored tokens of each sequence; answered by Likelihoods.

    index is the item that they belong to, for messages.
    """

    kind: Literal["likelihood"] = "likelihood"
    model: int
    index: int
    ids: tuple[str, ...]
    n_scored: tuple[int, ...]


class Embed(FrozenModel):
    """Embed a text with every model; answered by Started and Embedded for each."""

    kind: Literal["embed"] = "embed"
    index: int
    ids: str


class Draw(FrozenModel):
    """Draw sequences of these numbers (see tokens.py); answered by Drawn for each, and meanwhile.

    name and text are those of the corpus for tokens of kind text. With is_tapped, tokens of kind
    self are drawn under the tap, which then has seen all of them.
    """

    kind: Literal["draw"] = "draw"
    tokens: TokenKind
    n_ctx: int
    seed: int
    indices: tuple[int, ...]
    name: str = ""
    text: str | None = None
    control_tokens: bool = False
    is_tapped: bool = False


class TapWeights(FrozenModel):
    """Watch what these weights are multiplied with, for grams with XᵀX; answered by Tapped.

    head is the weight that makes the logits: Observe does not compute it again. draft_layers are
    those that draft tokens: with any, Observe runs them as well, and the head.
    """

    kind: Literal["tap"] = "tap"
    names: tuple[str, ...]
    grams: tuple[str, ...] = ()
    head: str | None = None
    draft_layers: tuple[int, ...] = ()


class Observe(FrozenModel):
    """Decode a sequence under the tap; answered by Observed."""

    kind: Literal["observe"] = "observe"
    ids: str


class Keep(FrozenModel):
    """Keep what the tap takes in this file (kept.py), every so many seconds; answered by Resumed.

    What the file has of this key is restored first. Saving leaves `spare` bytes of the disk.
    """

    kind: Literal["keep"] = "keep"
    path: str
    key: str
    seconds: float
    spare: int


class Collect(FrozenModel):
    """Write what the tap took into a file (kept.py); answered by Collected."""

    kind: Literal["collect"] = "collect"
    path: str
    key: str


class VocabInfo(FrozenModel):
    """What a tokenizer is: n_tokens, its special tokens, and a hash that tells tokenizers apart."""

    n_tokens: int
    bos: int
    adds_bos: bool
    sha256: str


class ModelInfo(FrozenModel):
    """What llama.cpp knows of a loaded model; pooling is how tokens become one embedding."""

    description: str
    n_ctx_train: int
    vocab: VocabInfo
    pooling: str = "none"


class SystemInfo(FrozenModel):
    """Which llama.cpp runs, and with which features of the CPU."""

    llama_cpp_python: str
    build: str
    system_info: str
    cpu: str


class Opened(FrozenModel):
    kind: Literal["opened"] = "opened"
    models: tuple[ModelInfo, ...]
    system: SystemInfo
    n_batch: int


class Tokenized(FrozenModel):
    """Token ids, and where in the text's UTF-8 bytes each token ends."""

    kind: Literal["tokenized"] = "tokenized"
    ids: str
    ends: str


class Detokenized(FrozenModel):
    """The tokens' text in base64 (it need not be UTF-8), and where in it each token ends."""

    kind: Literal["detokenized"] = "detokenized"
    text: str
    ends: str


class Started(FrozenModel):
    """The worker begins with this model and sequence (so that a crash can be named)."""

    kind: Literal["started"] = "started"
    model: int
    index: int | None


class Divergences(FrozenModel):
    """Sums over a sequence's scored tokens, against the reference; tokens as SequenceScore's."""

    reference_nll_sum: float
    kld_sum: float
    kld_max: float
    n_same_top: int
    delta_p_sum: float
    delta_p_squared_sum: float
    token_kld: str
    token_same_top: str
    token_reference_nll: str


class Scored(FrozenModel):
    """One model's scores of a sequence; n_broken targets, from first_broken on, had no numbers.

    in_model and in_reference say whose logits gave none there.
    """

    kind: Literal["scored"] = "scored"
    model: int
    index: int
    n_scored: int
    nll_sum: float
    token_nll: str
    divergences: Divergences | None
    n_broken: int
    first_broken: int
    in_model: bool = True
    in_reference: bool = False
    seconds: float
    decode_seconds: float


class Embedded(FrozenModel):
    """One model's embedding of a text, as encode_float32 writes it."""

    kind: Literal["embedded"] = "embedded"
    model: int
    index: int
    vector: str
    seconds: float


class Drawn(FrozenModel):
    """Tokens that were drawn since the answer before, in so many seconds.

    ids is a sequence that is complete: the last answers to a Draw, one for each number, in order.
    """

    kind: Literal["drawn"] = "drawn"
    n_tokens: int
    seconds: float
    ids: str | None = None


class Generated(FrozenModel):
    """The prompts' continuations, each up to an end of generation."""

    kind: Literal["generated"] = "generated"
    ids: tuple[str, ...]
    seconds: float


class Likelihoods(FrozenModel):
    """Log p of each sequence's end, in nats, and whether every token of it is the most probable."""

    kind: Literal["likelihoods"] = "likelihoods"
    values: tuple[float, ...]
    greedy: tuple[bool, ...]


class Tapped(FrozenModel):
    """The tap is in place."""

    kind: Literal["tapped"] = "tapped"


class Observed(FrozenModel):
    """A sequence was decoded under the tap."""

    kind: Literal["observed"] = "observed"
    seconds: float


class Resumed(FrozenModel):
    """What an earlier run has done under the tap: events (sequences read, draws completed).

    draws are the sequences of these, n_drawn the tokens of a further draw that was under way.
    """

    kind: Literal["resumed"] = "resumed"
    n_events: int = 0
    draws: tuple[tuple[str, ...], ...] = ()
    n_drawn: int = 0


class Collected(FrozenModel):
    """The file is written."""

    kind: Literal["collected"] = "collected"


class Failed(FrozenModel):
    """llama.cpp, or this package, refused: an error that has a message and no crash.

    model_kind is what the model is, where that is why.
    """

    kind: Literal["failed"] = "failed"
    message: str
    model_kind: ModelKind | None = None


AnyRequest = (
    Open
    | Tokenize
    | Detokenize
    | Generate
    | Likelihood
    | Score
    | Embed
    | Draw
    | TapWeights
    | Observe
    | Keep
    | Collect
)
Answer = (
    Opened
    | Tokenized
    | Detokenized
    | Generated
    | Likelihoods
    | Scored
    | Embedded
    | Drawn
    | Tapped
    | Observed
    | Resumed
    | Collected
)
AnyResponse = Answer | Started | Failed
RequestAdapter: TypeAdapter[AnyRequest] = TypeAdapter(
    Annotated[AnyRequest, Field(discriminator="kind")]
)
ResponseAdapter: TypeAdapter[AnyResponse] = TypeAdapter(
    Annotated[AnyResponse, Field(discriminator="kind")]
)


def pack_ids(ids: npt.ArrayLike) -> str:
    """Return base64 of the ids as little-endian int32."""
    return base64.b64encode(np.asarray(ids, dtype="<i4").tobytes()).decode("ascii")


def unpack_ids(text: str) -> TokenIds:
    """Return the ids that pack_ids wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<i4").astype(np.int32)


Float32Array = npt.NDArray[np.float32]


def encode_float32(values: npt.ArrayLike) -> str:
    """Return base64 of the values as little-endian float32."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def decode_float32(text: str) -> Float32Array:
    """Return the values that encode_float32 wrote. Raises ValueError for anything else."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)


def encode_bits(values: npt.ArrayLike) -> str:
    """Return base64 of the truth values, eight a byte, the first in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(values, dtype=bool)).tobytes()).decode("ascii")


def decode_bits(text: str, n: int) -> npt.NDArray[np.bool_]:
    """Return the n values that encode_bits wrote. Raises ValueError for anything else."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(packed) != -(-n // 8):
        raise ValueError(f"{8 * len(packed)} bits for {n} values")
    return np.unpackbits(packed, count=n).astype(bool)
