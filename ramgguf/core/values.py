"""Small values that several packages share."""

from typing import Literal

from ramgguf.core.documents import FrozenModel

TokenKind = Literal["self", "random", "text"]


class HubFile(FrozenModel):
    """A file on the hub; the revision of one that was fetched is the hash of a commit."""

    repo: str
    revision: str
    file: str

    @property
    def address(self) -> str:
        """What brings this very file back."""
        repo = f"hf://{self.repo}@{self.revision}"
        return f"{repo}/{self.file}" if self.file else repo
