"""The child process with a LayerRounding in it."""

from contextlib import ExitStack
from pathlib import Path

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.child import answer_requests
from ramgguf.llama.layer_rounding import LayerRounding
from ramgguf.llama.layer_rounding_protocol import (
    AnyRoundingRequest,
    LayerRounded,
    OpenRounding,
    RoundingOpened,
    RoundingRequestAdapter,
    RoundLayer,
    SkipLayer,
)
from ramgguf.quants.imatrix import planned_imatrix
from ramgguf.quants.scales import with_scales


class RoundingSession:
    """The rounding, once it is open, and the answers to requests."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._rounding: LayerRounding | None = None

    def answer(self, request: AnyRoundingRequest) -> FrozenModel:
        """Return the answer to a request; the first opens the rounding."""
        if isinstance(request, OpenRounding):
            return self._open(request)
        if self._rounding is None:
            raise EngineError("there is no model yet; this is a bug of ramgguf")
        match request:
            case RoundLayer():
                return self._rounded(self._rounding, request.layer)
            case SkipLayer():
                if self._rounding.checksum(request.names) != request.checksum:
                    return self._rounded(self._rounding, request.layer)
                self._rounding.skip(request.layer)
                return LayerRounded(
                    layer=request.layer, names=request.names, checksum=request.checksum
                )

    def _rounded(self, rounding: LayerRounding, layer: int) -> LayerRounded:
        names, checksum = rounding.round(layer)
        return LayerRounded(layer=layer, names=names, checksum=checksum)

    def _open(self, request: OpenRounding) -> RoundingOpened:
        enter = self._stack.enter_context
        plain = enter(open_gguf(Path(request.path), kind_check=True))
        imatrix = planned_imatrix(request.imatrix)
        assert imatrix is not None  # one is named
        self._rounding = enter(
            LayerRounding(
                with_scales(plain, request.imatrix.scales_path),
                enter(open_gguf(Path(request.quantized))),
                Path(request.folder),
                request.names,
                encoder_name=request.encoder,
                imatrix=imatrix,
                tokens=request.tokens,
                n_sequences=request.n_sequences,
                n_ctx=request.n_ctx,
                threads=request.n_threads,
            )
        )
        return RoundingOpened(n_layers=self._rounding.n_layers)


def main() -> None:
    """Answer requests until the parent goes."""
    answer_requests(RoundingRequestAdapter, RoundingSession().answer)


if __name__ == "__main__":
    main()
