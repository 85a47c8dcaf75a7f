"""How long measuring sensitivities would take, told without loading the model."""

from collections.abc import Sequence

# Recorded: 211 tensors of smol768 (189 M weights, F16) read with 512 tokens each took 526 s of CPU
# time on one thread of an Intel Xeon (Sapphire Rapids) that was busy with other work.
FLOP_PER_THREAD_SECOND = 78e9
N_TOKENS = 512


def sensitivity_seconds(n_weights: Sequence[int], threads: int) -> float:
    """Return an estimate of the seconds for one sequence of N_TOKENS: 2 operations per weight.

    n_weights are those of the tensors that are read. Too high for mixtures of experts, of which few
    take part in a token.
    """
    operations = 2.0 * N_TOKENS * sum(n_weights) * len(n_weights)
    return operations / (FLOP_PER_THREAD_SECOND * threads)
