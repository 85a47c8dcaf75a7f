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


@dataclass(frozen=True)
class Target:
    """A program; ties are names of TIES."""

    name: str
    summary: str
    ties: tuple[str, ...] = ()


TARGETS = {
    t.name: t
    for t in (
        Target(
            "vllm",
            "one format for q, k, v and for gate, up of each layer",
            ties=tuple(TIES),
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


def target_note(name: str, ties: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the line about the ties of the target, given all of a plan."""
    wanted = [TIES[tie] for tie in target(name).ties]
    tied = "; ".join(", ".join(tie) for tie in ties if tie in wanted)
    if tied:
        yield f"for {name}, which fuses them, these of a layer take one format: {tied}"
    elif wanted:
        yield f"--for {name} ties nothing: no layer has two tensors that it fuses"
