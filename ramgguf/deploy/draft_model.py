"""Whether a draft model suits a model: what llama.cpp refuses, and what makes drafts worse.

llama.cpp compares the two vocabularies (common_speculative_are_compatible in
common/speculative.cpp) and refuses a draft model whose tokens are others.
"""

from collections.abc import Iterator

from ramgguf.core.errors import BudgetError
from ramgguf.gguf.architecture import TOKEN_EMBEDDING
from ramgguf.gguf.reader import GGUFFile
from ramgguf.plan import LEAST_DRAFT_BPW
from ramgguf.plan.result import Plan

_MOST_TOKENS_APART = 128
_FIRST_TOKEN = 5  # tokens before it may differ
_TOKENS = "tokenizer.ggml.tokens"
# A draft that agreed with smol768 at 96 % of tokens did so at 88 % with it in 6.5 bpw, at 71 % in
# 4.5, at 50 % in 3.5 (docs/memory.md). Larger models lose less.
LEAST_MODEL_BPW = 5.0


def require_draft(draft: GGUFFile, model: GGUFFile) -> None:
    """Raise BudgetError for a draft model that llama.cpp refuses beside the model.

    What one of the two headers does not say is not compared.
    """
    found = _difference(draft, model)
    if found is not None:
        raise BudgetError(
            f"{draft.paths[0]}: {found}; llama.cpp refuses it as a draft model, which needs the "
            "model's vocabulary"
        )


def _difference(draft: GGUFFile, model: GGUFFile) -> str | None:
    """Return how the vocabularies differ where they must not."""
    kinds = [f.metadata.string("tokenizer.ggml.model") for f in (draft, model)]
    if None not in kinds and kinds[0] != kinds[1]:
        return f"its tokenizer is {kinds[0]}, the model's {kinds[1]}"
    sizes = [_n_tokens(f) for f in (draft, model)]
    if None in sizes or abs((sizes[0] or 0) - (sizes[1] or 0)) > _MOST_TOKENS_APART:
        return f"has {sizes[0]} tokens and the model {sizes[1]}"
    for end in ("bos", "eos"):
        adds = [f.metadata.flag(f"tokenizer.ggml.add_{end}_token") for f in (draft, model)]
        ids = [f.metadata.integer(f"tokenizer.ggml.{end}_token_id") for f in (draft, model)]
        if None not in adds and adds[0] != adds[1]:
            whose = "it begins" if end == "bos" else "it ends"
            return f"{whose} a text with {end.upper()} and the model does not, or the other way"
        if all(adds) and None not in ids and ids[0] != ids[1]:
            return f"its {end.upper()} is token {ids[0]}, the model's {ids[1]}"
    tokens = [f.metadata.strings(_TOKENS) for f in (draft, model)]
    pairs = zip(tokens[0] or (), tokens[1] or (), strict=False)
    for number, (own, other) in enumerate(pairs):
        if number >= _FIRST_TOKEN and own != other:
            return f"its token {number} is {own!r}, the model's {other!r}"
    return None


def _n_tokens(file: GGUFFile) -> int | None:
    return next((t.shape[1] for t in file.tensors if t.name == TOKEN_EMBEDDING), None)


def draft_bpw(draft: GGUFFile) -> float:
    """Return bits per weight over the draft's matrices."""
    matrices = [t for t in draft.tensors if len(t.shape) > 1]
    return 8 * sum(t.n_bytes for t in matrices) / max(1, sum(t.n_weights for t in matrices))


def draft_notes(draft: GGUFFile, plan: Plan) -> Iterator[str]:
    """Yield notes where few bits, of the draft or of the model, may make drafts worse.

    Neither is measured here: `quantize --score` measures the model's part.
    """
    own = draft_bpw(draft)
    if own < LEAST_DRAFT_BPW:
        yield (
            f"the draft model {draft.paths[0]} has {own:.2f} bpw: the text is the same, but fewer "
            f"drafts may be accepted; {LEAST_DRAFT_BPW:g} bpw and more are common, and cost little"
        )
    if plan.bpw < LEAST_MODEL_BPW:
        yield (
            f"the model has {plan.bpw:.2f} bpw, and a draft model proposes what the original would "
            "say: fewer drafts may be accepted; --score measures how many"
        )
