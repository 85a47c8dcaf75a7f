"""Write samples into a folder, as seeds for the fuzzers: FOLDER/gguf and FOLDER/documents."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf_samples
import ramgguf
import synthetic


def main() -> None:
    """Write one file for each sample."""
    folder, documents = (Path(sys.argv[1]) / name for name in ("gguf", "documents"))
    folder.mkdir(parents=True, exist_ok=True)
    documents.mkdir(exist_ok=True)
    measurement = synthetic.measurement(n_layers=1)
    small = measurement.model_copy(update={"tensors": measurement.tensors[:2]})
    for document in (small, ramgguf.plan(small, 10**6, min_sqnr_db=0)):
        document.save(documents / document.KIND)
    (folder / "sound").write_bytes(gguf_samples.SOUND.bytes())
    for i, case in enumerate(gguf_samples.hostile_files()):
        if len(case.content) < 4096:
            (folder / f"{i:03}").write_bytes(case.content)


if __name__ == "__main__":
    main()
