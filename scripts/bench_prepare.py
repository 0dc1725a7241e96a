"""Speed and memory of `moelm prepare` on a large file, compared with `tokenizers` encoding the same text.

    python scripts/bench_prepare.py --megabytes 1000

The file repeats the builtin corpus; each copy of a document has a line of its own, so that none is a duplicate.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from moelm.config import SourceConfig
from moelm.data.corpus.builtin import builtin_documents
from moelm.data.dataset_writer import BATCH_CHARS
from moelm.data.document import Document
from moelm.data.sources import read_source
from moelm.data.tokenizer import Tokenizer

CONFIG = {
    "name": "bench",
    "model": {"dim": 16, "num_layers": 1, "num_heads": 1, "ffn": {"kind": "dense", "hidden_dim": 16}},
    "data": {"sources": [{"path": "text.txt"}], "tokenizer": {"kind": "bpe", "vocab_size": 4096}, "seq_len": 256},
    "train": {"steps": 1, "batch_tokens": 256},
    "optim": {"lr": 0.001},
}


def write_corpus(path: Path, size: int) -> None:
    """Write about `size` bytes of text."""
    documents = list(builtin_documents())
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for copy, document in ((copy, document) for copy in itertools.count() for document in documents):
            written += len(document.text.encode()) + file.write(f"Copy {copy}.\n")
            file.write(f"{document.text}\n\n")
            if written >= size:
                return


def prepare(folder: Path, *overrides: str) -> float:
    """Seconds that the command takes."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "moelm", "prepare", "bench.yaml", *overrides], cwd=folder, check=True)
    return time.monotonic() - started


def encode_alone(path: Path, tokenizer: Tokenizer) -> float:
    """Seconds of `encode_batch_fast` over the same documents in the same batches; reading them is not counted."""
    seconds = 0.0
    documents = read_source(SourceConfig(path=str(path)), 16_000_000)
    while batch := next_batch(documents, BATCH_CHARS):
        started = time.monotonic()
        tokenizer.raw.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.monotonic() - started
    return seconds


def next_batch(documents: Iterator[Document], chars: int) -> list[str]:
    """The next texts, with at least `chars` characters in total unless the documents end."""
    batch: list[str] = []
    for document in documents:
        batch.append(document.text)
        if (chars := chars - len(document.text)) <= 0:
            break
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    target_megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "text.txt", target_megabytes * 1_000_000)
        (folder / "bench.yaml").write_text(yaml.safe_dump(CONFIG))
        megabytes = (folder / "text.txt").stat().st_size / 1e6
        whole = prepare(folder)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        (tokenizer,) = (folder / "data").glob("*/tokenizer.json")
        encoding = prepare(folder, "data.tokenizer.kind=file", f"data.tokenizer.path={tokenizer}")
        alone = encode_alone(folder / "text.txt", Tokenizer.load(tokenizer))
    results = {
        "megabytes": round(megabytes),
        "peak_memory_mb": round(peak),
        "prepare_mb_per_s": round(megabytes / whole, 2),
        "prepare_known_tokenizer_mb_per_s": round(megabytes / encoding, 2),
        "tokenizers_alone_mb_per_s": round(megabytes / alone, 2),
        "known_tokenizer_over_alone": round(alone / encoding, 3),
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
