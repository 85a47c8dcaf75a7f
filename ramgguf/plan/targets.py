"""Programs that run the file, and what they want of it beyond what llama.cpp wants."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ramgguf.core.errors import PlanError
from ramgguf.gguf.architecture import PARTS
from ramgguf.measure.result import Measurement

# Shorthands of --tie: what fused kernels want in one format.
TIES = {
    "qkv": PARTS["attn_qkv"].fuses,
    "gate-up": PARTS["ffn_gate_up"].fuses,
    "gate-up-exps": PARTS["ffn_gate_up_exps"].fuses,
    "gate-up-shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
}


# vllm/model_executor/layers/quantization/gguf.py at 00620f9; it raises an error for others.
_VLLM = frozenset(
    (
        *("F32", "F16", "BF16"),
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)


@dataclass(frozen=True)
class Target:
    """A program; ties are names of TIES, formats those that it runs (None: all)."""

    name: str
    summary: str
    ties: tuple[str, ...] = ()
    formats: frozenset[str] | None = None


TARGETS = {
    t.name: t
    for t in (
        Target(
            "vllm",
            "one format for q, k, v and for gate, up of each layer",
            ties=tuple(TIES),
            formats=_VLLM,
        ),
        Target("ollama", "a Modelfile beside the output"),
    )
}


def target(name: str) -> Target:
    """Return the target of this name; PlanError for any other."""
    if name not in TARGETS:
        raise PlanError(f"target {name!r} is none of {', '.join(TARGETS)}")
    return TARGETS[name]


def target_ties(name: str, measurement: Measurement) -> tuple[tuple[str, ...], ...]:
    """Return the roles that the target wants tied, where a layer of the model has two of them."""
    found = []
    for tie in target(name).ties:
        layers = [t.layer for t in measurement.tensors if t.role in TIES[tie] and t.kept is None]
        if len(layers) > len(set(layers)):
            found.append(TIES[tie])
    return tuple(found)


def runs(name: str | None, format_name: str) -> bool:
    """Return whether the target, None for llama.cpp, runs the format."""
    known = None if name is None else target(name).formats
    return known is None or format_name in known


def target_note(name: str, ties: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the line about the ties of the target, given all of a plan."""
    wanted = [TIES[tie] for tie in target(name).ties]
    tied = "; ".join(", ".join(tie) for tie in ties if tie in wanted)
    if tied:
        yield f"for {name}, which fuses them, these of a layer take one format: {tied}"
    elif wanted:
        yield f"--for {name} ties nothing: no layer has two tensors that it fuses"
