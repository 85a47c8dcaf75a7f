"""Documents are read whole, in as much memory as they have bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import read_bytes

_LIMITED = """
import resource, sys
from pathlib import Path
from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import read_bytes
resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))
print(len(read_bytes(Path(sys.argv[1]), error=PlanError)))
"""


def test_a_small_document_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(bytes(3 << 20))
    command = [sys.executable, "-c", _LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{3 << 20}\n", "")


@pytest.mark.parametrize("n_bytes", [0, 1, 2 << 20, (2 << 20) + 1])
def test_a_document_is_read_whole_or_refused(tmp_path: Path, n_bytes: int) -> None:
    path, most = tmp_path / "document", 2 << 20
    path.write_bytes(bytes(i % 251 for i in range(n_bytes)))
    if n_bytes > most:
        with pytest.raises(PlanError, match=f"more than {most} bytes"):
            read_bytes(path, error=PlanError, most=most)
    else:
        assert read_bytes(path, error=PlanError, most=most) == path.read_bytes()
