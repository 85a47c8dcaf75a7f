"""Where a number comes from: machine, commit, command, versions."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from ramgguf.llama.system import cpu_name


def provenance() -> dict[str, str]:
    """Return the fields that every row of bench/results has."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu_name(),
        "commit": commit or "unknown",
        "command": " ".join(
            ["python", f"bench/{Path(sys.argv[0]).name}", *map(_bare, sys.argv[1:])]
        ),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
    }


def _bare(argument: str) -> str:
    """Return the argument, of a path only the last part: folders are nobody's business."""
    return Path(argument).name if "/" in argument else argument
