"""Values that notebooks show as a table: who draws them is named from above."""

TYPE_CHECKING = False  # typing's: the package's front door waits for this module
if TYPE_CHECKING:
    from collections.abc import Callable

_artists: "list[Callable[[object], str | None]]" = []


def drawn_by(artist: "Callable[[object], str | None]") -> None:
    """Have artist draw values for notebooks: it returns HTML, or None for what it does not know.

    The package's front door names one; values are below those rooms that know how to draw.
    """
    _artists[:] = [artist]


class Drawn:
    """A value that notebooks show as a table."""

    def _repr_html_(self) -> str | None:
        """Return the value as HTML, None where nothing draws it."""
        return _artists[0](self) if _artists else None
