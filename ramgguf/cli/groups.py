"""Groups of options that several commands share: a dataclass whose fields are the options."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command for typer, with the fields of its groups as options of their own.

    A group is a parameter whose type is a dataclass; every field is Annotated as an option and has
    a default. The command itself is called with the group.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        assert isinstance(kind, type)
        types = get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)
        groups[parameter.name] = (kind, [f.name for f in fields])
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
            )
            for f in fields
        ]

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        for name, (kind, fields) in groups.items():
            options[name] = kind(**{field: options.pop(field) for field in fields})
        command(**options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flat.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [p.replace(kind=keyword) for p in parameters]
    )
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    del flat.__wrapped__
    return flat
