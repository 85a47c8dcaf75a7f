"""Write the sound and malformed sample files into a folder, as seeds for the fuzzers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf_samples


def main() -> None:
    """Write one file for each sample."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sound").write_bytes(gguf_samples.SOUND.bytes())
    for i, case in enumerate(gguf_samples.hostile_files()):
        if len(case.content) < 4096:
            (folder / f"{i:03}").write_bytes(case.content)


if __name__ == "__main__":
    main()
