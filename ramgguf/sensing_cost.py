"""How long measuring sensitivities would take, told without loading the model."""

from ramgguf.schema import Plan
from ramgguf.simulation import SOURCES

# Recorded: 211 tensors of smol768 (189 M weights, F16) read with 512 tokens each took 526 s of CPU
# time on one thread of an Intel Xeon (Sapphire Rapids) that was busy with other work.
FLOP_PER_THREAD_SECOND = 78e9
N_TOKENS = 512


def sensing_seconds(plan: Plan, threads: int) -> float:
    """Return an estimate of the seconds for one sequence of N_TOKENS: 2 operations per weight.

    Too high for mixtures of experts, of which few take part in a token.
    """
    probed = [
        a.n_weights
        for a in plan.assignments
        if a.source_format in SOURCES and (a.note is None or a.note.startswith("pinned"))
    ]
    operations = 2.0 * N_TOKENS * sum(probed) * len(probed)
    return operations / (FLOP_PER_THREAD_SECOND * threads)
