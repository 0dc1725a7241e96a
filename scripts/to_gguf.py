"""Convert an exported directory to GGUF with llama.cpp's own converter.

    python scripts/to_gguf.py LLAMA_CPP_CHECKOUT EXPORTED --outfile model.gguf --outtype f32

The converter identifies how a tokenizer splits text by a hash of the tokens of a sample, so it does not recognize
tokenizers trained by moelm. Those split text as GPT-2's does, which llama.cpp supports; this script makes the
converter treat them so, and leaves everything else to it. Arguments after the directory are passed to the converter.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def splits_like_gpt2(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE that splits text as GPT-2 does, or has no merges, which need no split."""
    model, pre_tokenizer = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    byte_level = (
        model["type"] == "BPE" and pre_tokenizer.get("type") == "ByteLevel" and not pre_tokenizer.get("add_prefix_space")
    )
    return byte_level and (pre_tokenizer.get("use_regex", True) or not model["merges"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("exported", type=Path)
    arguments, converter_arguments = parser.parse_known_args()
    tokenizer = arguments.exported / "tokenizer.json"
    for required in (tokenizer, arguments.llama_cpp / "convert_hf_to_gguf.py"):
        if not required.exists():
            sys.exit(f"There is no {required}.")
    if not splits_like_gpt2(json.loads(tokenizer.read_text(encoding="utf-8"))):
        sys.exit(
            f"{tokenizer} is not byte-level BPE with GPT-2's split of text, which is all that this script can convert."
        )
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    converter = importlib.import_module("convert_hf_to_gguf")
    base = importlib.import_module("conversion.base") if (arguments.llama_cpp / "conversion").is_dir() else converter
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(arguments.exported), *converter_arguments]
    converter.main()


if __name__ == "__main__":
    main()
