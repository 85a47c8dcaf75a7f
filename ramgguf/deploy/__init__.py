"""Deploy: does a file run here, in how much memory, how fast."""

from ramgguf.deploy.checking import check
from ramgguf.deploy.division_rooms import MemoryRequest
from ramgguf.deploy.memory import MemoryLimit
from ramgguf.deploy.picking import pick

__all__ = ["MemoryLimit", "MemoryRequest", "check", "pick"]
