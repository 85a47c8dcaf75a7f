"""A note where a plan gives the block that drafts tokens less than the text's own layers.

Blocks of multi-token prediction never change the text: what they propose is checked by the trunk.
Their errors cost speed, as fewer proposals are accepted, which no objective here counts.
"""

from collections.abc import Iterator, Sequence

from ramgguf.gguf.architecture import draft_layers, layer_of
from ramgguf.measure.result import Measurement
from ramgguf.plan.priors import ModelShape
from ramgguf.plan.result import Assignment

LEAST_DRAFT_BPW = 4.5  # that of Q4_K: what drafts commonly have


def draft_notes(measurement: Measurement, assignments: Sequence[Assignment]) -> Iterator[str]:
    """Yield a note if matrices of draft blocks have fewer than LEAST_DRAFT_BPW, the trunk more.

    Bits per weight are over all matrices of the layers; what the plan had no choice in counts.
    """
    named = draft_layers(t.name for t in measurement.tensors)
    shape = ModelShape(measurement.n_layers, drafts=named)
    counted = {"draft": [0, 0], "trunk": [0, 0]}
    layers: set[int] = set()
    for tensor, a in zip(measurement.tensors, assignments, strict=True):
        layer = layer_of(tensor.name)
        if layer is None or len(tensor.shape) < 2:
            continue
        if shape.is_draft(layer):
            layers.add(layer)
        of = counted["draft" if layer in layers else "trunk"]
        of[0] += a.n_bytes
        of[1] += tensor.n_weights
    if not (counted["draft"][1] and counted["trunk"][1]):
        return
    draft, trunk = (8 * n_bytes / n_weights for n_bytes, n_weights in counted.values())
    if draft < min(LEAST_DRAFT_BPW, trunk):
        numbers = "|".join(map(str, sorted(layers)))
        yield (
            f"the layers that draft tokens (multi-token prediction) have {draft:.2f} bpw, the "
            f"others {trunk:.2f}: the text is the same, but fewer drafts may be accepted, which "
            rf"was not measured; --pin 'blk\.({numbers})\.=Q5_K' gives them more"
        )
