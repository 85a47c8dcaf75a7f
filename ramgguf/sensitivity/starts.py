"""At which layers passes begin: the layers before a changed tensor need not be computed again.

Beginning at another layer costs a load of the model, a pass that captures what enters there, and
one that shows that nothing else has changed. The starts are those of least time in all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from ramgguf.gguf.architecture import first_layer, is_multiplied, is_of_experts, layer_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.sensitivity.timing import Costs

# Layers after which kinds of attention repeat, where no metadata say it (llama.cpp, src/models):
# a model that begins in between would have them in other layers.
_PERIODS: Mapping[str, int] = MappingProxyType(
    {"gemma2": 2, "gpt-oss": 2, "gemma3": 6}
    | dict.fromkeys(("cohere2", "exaone4", "llama4", "olmo2", "qwen3next", "smallthinker"), 4)
    | {"smollm3": 4}
)


@dataclass(frozen=True)
class Depth:
    """What a pass has to compute from each layer on.

    shares[s] is what a pass from layer s on takes of a whole one, by the weights that tokens are
    multiplied with, head what all that follows the layers takes; period: passes may begin at its
    multiples.
    """

    shares: tuple[float, ...]
    tied: bool
    period: int = 1
    head: float = 0.0

    @classmethod
    def of(cls, file: GGUFFile) -> "Depth":
        """Return the model's; one without layers is one layer."""
        arch, tied = file.architecture, file.has_tied_embedding
        n_layers = max(1, file.n_trunk_layers or 1)
        used = file.metadata.integer(f"{arch}.expert_used_count") or 1
        chosen = used / max(used, file.metadata.integer(f"{arch}.expert_count") or 1)
        layers, head = [0.0] * n_layers, 0.0
        for t in file.tensors:
            layer = layer_of(t.name)
            if not is_multiplied(t.name, t.shape, arch, tied=tied):
                continue
            n = t.n_weights * (chosen if is_of_experts(t.name) else 1.0)
            if layer is None:
                head += n
            elif layer < n_layers:
                layers[layer] += n
        after = list(accumulate(reversed(layers), initial=head))[:0:-1]
        period = file.metadata.integer(f"{arch}.attention.sliding_window_pattern")
        shares = tuple(n / after[0] if after[0] else 1.0 for n in after)
        whole = after[0] if after[0] else 1.0
        return cls(shares, tied, max(1, period or _PERIODS.get(arch, 1)), head / whole)

    def first(self, tensor: TensorInfo) -> int:
        """Return the first layer that computes something else when the tensor is changed."""
        return first_layer(tensor.name, len(self.shares), tied=self.tied)

    def after(self, layer: int) -> float:
        """Return what a pass from behind the layer on takes of a whole one."""
        return self.shares[layer + 1] if layer + 1 < len(self.shares) else self.head


@dataclass(frozen=True)
class TensorPass:
    """A pass with one tensor changed, over all sequences; it may end after a layer."""

    tensor: TensorInfo
    end: int | None = None


@dataclass(frozen=True)
class Starts:
    """The layers at which passes over n_sequences begin, the first of them 0."""

    depth: Depth
    costs: Costs
    n_sequences: int
    layers: tuple[int, ...] = (0,)

    @classmethod
    def planned(
        cls, depth: Depth, costs: Costs, n_sequences: int, passes: Iterable[TensorPass]
    ) -> "Starts":
        """Return the starts with which the passes take the least time.

        What a pass leaves out behind its end is the same wherever it starts.
        """
        whole = cls(depth, costs, n_sequences)
        if costs.reload is None:
            return whole
        n_layers = len(depth.shares)
        n_read = [0] * n_layers
        for one in passes:
            n_read[depth.first(one.tensor)] += 1
        before = list(accumulate(n_read, initial=0))  # readings of layers before each one
        each = n_sequences * costs.each / costs.n_workers
        layers = range(0, n_layers, depth.period)
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start in reversed(layers):
            share = depth.shares[start]
            options: list[tuple[float, tuple[int, ...]]] = []
            options.append((share * each * (before[-1] - before[start]), (start,)))
            for then in layers[start // depth.period + 1 :]:
                own = share * each * (before[then] - before[start])
                seconds, rest = best[then]
                options.append((own + whole.switch(start, then) + seconds, (start, *rest)))
            best[start] = min(options)
        return cls(depth, costs, n_sequences, best[0][1])

    @cached_property
    def _before(self) -> Mapping[int, int]:
        return dict(zip(self.layers[1:], self.layers, strict=False))

    def start(self, tensor: TensorInfo) -> int:
        """Return the layer at which passes with this tensor changed begin."""
        first = self.depth.first(tensor)
        return max(layer for layer in self.layers if layer <= first)

    def reading(self, one: TensorPass) -> float:
        """Return the seconds of a pass, and of making its tensor."""
        share = self.depth.shares[self.start(one.tensor)]
        share -= 0.0 if one.end is None else self.depth.after(one.end)
        return self.costs.reading(one.tensor, self.n_sequences, share)

    def switch(self, start: int, then: int) -> float:
        """Return the seconds of going from one start to another: to load, capture and check."""
        costs, shares = self.costs, self.depth.shares
        if then == start or costs.reload is None:
            return 0.0
        if then < start:  # by the whole model
            return costs.reload + (self.switch(0, then) if then else 0.0)
        captured = self.n_sequences * (shares[start] - shares[then])
        return costs.reload + costs.each * (captured + shares[then])

    def seconds(self, passes: Iterable[TensorPass], at: int = 0) -> list[float]:
        """Return the seconds of the first 1, 2, … of the passes, from start `at` on.

        With the first that ends at a layer comes the original's pass to there.
        """
        found, total, seen, ends = list[float](), 0.0, {at}, set[int]()
        for one in passes:
            start = self.start(one.tensor)
            if start not in seen:
                seen.add(start)
                total += self.switch(self._before[start] if start else at, start)
            total += self.reading(one)
            if one.end is not None and one.end not in ends:
                ends.add(one.end)
                share = self.depth.shares[start] - self.depth.after(one.end)
                total += self.n_sequences * self.costs.each * share / self.costs.n_workers
            found.append(total)
        return found

    def whole(self, passes: Sequence[TensorPass]) -> float:
        """Return what is still to come: tokens, the original's passes, readings, the last pass."""
        costs, n = self.costs, self.n_sequences
        before = n * (costs.drawing + costs.each)
        readings = self.seconds(passes)[-1] if passes else 0.0
        return before + readings + self.last

    @property
    def last(self) -> float:
        """The seconds of the last pass, a whole one, which shows that the copy is as before."""
        back = self.switch(self.layers[-1], 0) if len(self.layers) > 1 else 0.0
        return back + self.n_sequences * self.costs.each
