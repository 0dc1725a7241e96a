"""llama.cpp writes what moelm writes, where it is at hand: the package llama-cpp-python, and a checkout with its converter
that the environment's MOELM_LLAMA_CPP names."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelm.generate import Sampling, generate_tokens
from moelm.interop.export import export_run
from moelm.rundir import load_run
from tests.interop.test_export import DENSE, MOE, make

SCRIPT = Path(__file__).parents[2] / "scripts/to_gguf.py"
CHECKOUT = os.environ.get("MOELM_LLAMA_CPP")
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (MOE, {"tie_embeddings": False, "rope_theta": 300.0, "head_dim": 6}),
    "llama": (DENSE, {}),
    "qwen3_moe": ({**MOE, "router": {"kind": "topk", "normalize": False}}, {"qk_norm": True}),
    "qwen3": (DENSE, {"qk_norm": True}),
}


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="MOELM_LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_writes_the_same_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    make("bpe", *MODELS[kind])
    assert export_run("run", Path("out")) == kind
    words = [str(CHECKOUT), "out", "--outfile", "model.gguf", "--outtype", "f32"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = llama_cpp.Llama("model.gguf", n_ctx=64, verbose=False)
    ours, tokenizer, _ = load_run("run")
    prompt = "the red cat sees a"
    ids = tokenizer.encode_prompt(prompt)
    assert theirs.tokenize(prompt.encode()) == ids
    theirs.eval(ids)
    written = []
    for _ in range(20):
        written.append(theirs.sample(temp=0.0))
        theirs.eval(written[-1:])
    assert written == [step[0] for step in generate_tokens(ours, [ids], Sampling(20, temperature=0), tokenizer.eos_id)]


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("char", DENSE, {})
    export_run("run", Path("out"))
    Path("convert_hf_to_gguf.py").touch()
    for checkout, told in (("nowhere", "There is no nowhere"), (".", "no byte-level BPE")):
        done = subprocess.run([sys.executable, str(SCRIPT), checkout, "out"], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert told in done.stderr
