"""What all values have in common, and those that are files: JSON with a schema name and version."""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from ramgguf.core.drawing import Drawn
from ramgguf.core.errors import PlanError
from ramgguf.core.escape import json_text, surrogates_escaped
from ramgguf.core.files import write_atomically
from ramgguf.core.inputs import read_text


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Integers that JSON's numbers hold exactly everywhere; sums of them do not overflow 64 bits.
_LARGEST = 2**53 - 1
NonNegative = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(gt=0, le=_LARGEST)]
# Finite numbers whose sums and products are finite as well.
_HUGE = 1e100
Number = Annotated[float, Field(ge=-_HUGE, le=_HUGE)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=_HUGE)]
PositiveFloat = Annotated[float, Field(gt=0, le=_HUGE)]


class Document(FrozenModel, Drawn):
    """A value that is a file: `save` and `load` go through JSON and check name and version.

    Files of earlier versions are read, too: fields that came later have defaults.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def to_json(self) -> str:
        """Return the JSON text, headed by its schema: {"schema": "ramgguf.plan/1", ...}."""
        try:
            body = self.model_dump_json(indent=1, exclude_none=False)
        except PydanticSerializationError:  # a path of bytes that are no UTF-8
            body = json.dumps(surrogates_escaped(to_jsonable_python(self)), indent=1)
        return json_text(f'{{\n "schema": "ramgguf.{self.KIND}/{self.VERSION}",{body[1:]}\n')

    @classmethod
    def from_json(cls, text: str, *, name: str = "the text") -> Self:
        """Return the value that to_json wrote. Raises PlanError that names what is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"{name} is not JSON ({e}); was it cut short?") from None
        found = data.pop("schema", None) if isinstance(data, dict) else None
        known = [f"ramgguf.{cls.KIND}/{version}" for version in range(1, cls.VERSION + 1)]
        if found not in known:
            raise PlanError(f"{name}: schema is {found!r}, expected {known[-1]!r}")
        try:
            return cls.model_validate_json(json.dumps(data))
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            raise PlanError(": ".join(filter(None, (name, where, what)))) from None

    def save(self, path: Path) -> None:
        """Write the JSON to path, whole or not at all. Raises PlanError if it cannot be written."""
        write_atomically(path, self.to_json().encode(), error=PlanError)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the value in the file. Raises PlanError when it is unreadable or malformed."""
        return cls.from_json(read_text(path, error=PlanError), name=str(path))
