"""Exports converted to GGUF: llama.cpp generates the same tokens as moelm.

Needs the package llama-cpp-python, and a checkout of llama.cpp at the path in the environment variable MOELM_LLAMA_CPP.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelm.huggingface.export import export_run
from moelm.inference.generate import Sampling, generate_tokens
from moelm.runs.load import load_run
from tests.huggingface.test_export import DENSE, MOE, create_random_run

SCRIPT = Path(__file__).parents[2] / "scripts/to_gguf.py"
CHECKOUT = os.environ.get("MOELM_LLAMA_CPP")
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (MOE, {"tie_embeddings": False, "rope_theta": 300.0, "head_dim": 6}),
    "llama": (DENSE, {}),
    "qwen3_moe": ({**MOE, "router": {"kind": "topk", "normalize": False}}, {"qk_norm": True}),
    "qwen3": (DENSE, {"qk_norm": True}),
}


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="MOELM_LLAMA_CPP is not set to a checkout of llama.cpp")
@pytest.mark.parametrize("model_type", MODELS)
def test_llama_cpp_generates_the_same_tokens(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.chdir(tmp_path)
    create_random_run("bpe", *MODELS[model_type])
    assert export_run("run", Path("out")) == model_type
    argv = [sys.executable, str(SCRIPT), str(CHECKOUT), "out", "--outfile", "model.gguf", "--outtype", "f32"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gguf_model = llama_cpp.Llama("model.gguf", n_ctx=64, verbose=False)
    model, tokenizer, _ = load_run("run")
    prompt = "the red cat sees a"
    ids = tokenizer.encode_prompt(prompt)
    assert gguf_model.tokenize(prompt.encode()) == ids
    gguf_model.eval(ids)
    tokens = []
    for _ in range(20):
        tokens.append(gguf_model.sample(temp=0.0))
        gguf_model.eval(tokens[-1:])
    assert tokens == [step[0] for step in generate_tokens(model, [ids], Sampling(20, temperature=0), tokenizer.eos_id)]


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("char", DENSE, {})
    export_run("run", Path("out"))
    Path("convert_hf_to_gguf.py").touch()
    for checkout, message in (("nowhere", "There is no nowhere"), (".", "is not byte-level BPE")):
        done = subprocess.run([sys.executable, str(SCRIPT), checkout, "out"], capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr
