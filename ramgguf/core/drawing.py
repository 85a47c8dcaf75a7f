"""Values that notebooks show as a table: who draws them is named from above."""

TYPE_CHECKING = False  # typing's: the package's __init__ waits for this module
if TYPE_CHECKING:
    from collections.abc import Callable

_artists: "list[Callable[[object], str | None]]" = []


def drawn_by(artist: "Callable[[object], str | None]") -> None:
    """Register what draws values in notebooks: it returns HTML, or None for values it cannot draw.

    ramgguf/__init__.py registers it, because core must not import report.
    """
    _artists[:] = [artist]


class Drawn:
    """A value that notebooks show as a table."""

    def _repr_html_(self) -> str | None:
        """Return the value as HTML, None where nothing draws it."""
        return _artists[0](self) if _artists else None
