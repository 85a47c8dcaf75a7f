"""What the evaluation of an embedding model found: one value per model."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from ramgguf.core.corpus import Text
from ramgguf.core.documents import Document, FrozenModel, NonNegative, NonNegativeFloat, Positive
from ramgguf.evaluate.result import EngineSettings, ModelFile

N_NEIGHBOURS = 10

Share = Annotated[float, Field(ge=0, le=1)]
Correlation = Annotated[float, Field(ge=-1, le=1)]


class TextScore(FrozenModel):
    """How one text's embedding differs from the original's.

    cosine is that of the two embeddings. The others compare the text's cosines to all other texts
    under the two models: spearman their ranks, same_nearest the most similar text, same_neighbours
    the share of the ten most similar ones. text_start and text_end are its span in the corpus's
    UTF-8 bytes, title the heading that it falls under.
    """

    title: str | None = None
    text_start: NonNegative
    text_end: NonNegative
    excerpt: str
    n_tokens: Positive
    cosine: Correlation
    spearman: Correlation
    same_nearest: bool
    same_neighbours: Share


class EmbeddingResult(Document):
    """One embedding model against its original, text by text, in the order of the corpus.

    Texts are lines of the corpus, drawn with the seed, and cut to n_ctx tokens. token_ids_sha256 is
    of all texts' token ids (little-endian int32), one after the other. pooling is llama.cpp's.
    """

    KIND: ClassVar[str] = "embeddings"

    ramgguf_version: str
    model: ModelFile
    reference: ModelFile
    text: Text
    n_ctx: Positive
    n_lines: Positive
    seed: int
    pooling: str
    tokenizer_sha256: str
    token_ids_sha256: str
    engine: EngineSettings
    texts: tuple[TextScore, ...]
    notes: tuple[str, ...] = ()
    seconds: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        starts = [t.text_start for t in self.texts]
        if starts != sorted(set(starts)):
            raise ValueError("texts are not in the order of the corpus, or one is there twice")
        return self


def incomparable_embeddings(a: EmbeddingResult, b: EmbeddingResult) -> tuple[str, ...]:
    """Return the reasons why a and b must not be ranked together; empty where they may be."""
    pairs = (
        ("text", a.text.sha256, b.text.sha256),
        ("texts", f"{len(a.texts)}, seed {a.seed}", f"{len(b.texts)}, seed {b.seed}"),
        ("tokens per text", str(a.n_ctx), str(b.n_ctx)),
        ("token ids", a.token_ids_sha256, b.token_ids_sha256),
        ("reference", _identity(a.reference), _identity(b.reference)),
        ("pooling", a.pooling, b.pooling),
        ("llama.cpp build", a.engine.llama_cpp_build, b.engine.llama_cpp_build),
        ("safe kernels", str(a.engine.safe_kernels), str(b.engine.safe_kernels)),
    )
    return tuple(
        f"{what}: {left} for {a.model.label}, {right} for {b.model.label}"
        for what, left, right in pairs
        if left != right
    )


def _identity(model: ModelFile) -> str:
    return f"{model.header_sha256[:12]}/{(model.sample_sha256 or '')[:12]}"
