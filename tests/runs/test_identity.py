"""A run and its data: what is recorded, what is found again, and what is refused."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers

import moelm.cli.eval_
import moelm.data.corpus.builtin
import moelm.data.sources
from moelm.config import load_config
from moelm.data.document import Document
from moelm.data.prepare import prepare
from moelm.errors import MoelmError
from moelm.evaluation.losses import evaluate
from moelm.huggingface.export import export_run
from moelm.huggingface.model_card import _validation_section
from moelm.runs.directory import RunDirectory
from moelm.runs.load import load_run, open_run
from moelm.runs.record import LOSSY_NOTE
from moelm.sweep.execute import _is_finished
from moelm.train.setup import train
from moelm.upcycle import upcycle_run
from tests.conftest import metrics_lines

RUN = Path("runs/tiny-dense")


@pytest.fixture(autouse=True)
def _own_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the folder `trained`, with its files' times, as the current directory."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def resume(*overrides: str) -> float:
    """Run the command of the finished run again; returns its validation loss."""
    config = load_config("dense.yaml", overrides)
    evaluation = train(config, RunDirectory(Path("runs") / config.name))
    assert evaluation is not None
    return evaluation.overall.loss


def evaluate_run(name: str = "tiny-dense") -> float:
    run = open_run(name, "last", "val")
    return evaluate(run.model, run.rows, run.dtype).overall.loss


def environment() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RUN / "environment.json").read_text())
    return content


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """The files of a folder stay what they are."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_changed_text_is_not_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    logged, recorded = metrics_lines(RUN)[-1]["val/loss"], environment()
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text.replace("cat", "cow"))
    with unchanged(RUN), pytest.raises(MoelmError) as caught:
        resume()
    other = next(path for path in Path("data").iterdir() if str(path) != recorded["data_folder"])
    found = json.loads((other / "manifest.json").read_text())["data_sha256"]
    assert str(caught.value) == (
        f"runs/tiny-dense was trained on the data {recorded['data_fingerprint']} in {recorded['data_folder']}, but its "
        f"inputs (text.txt) have changed and give {found} in {other}; choose another name=..., restore them, or move the "
        f"changed files away to continue on the data in {recorded['data_folder']}."
    )
    assert evaluate_run() == logged  # of the text that the run was trained on
    Path("text.txt").rename("elsewhere.txt")
    assert resume() == logged
    assert "text.txt does not exist. The run continues on the data that was prepared in" in capsys.readouterr().err
    Path("text.txt").write_text(text)  # with another time
    assert resume() == logged
    assert (RUN / "tokenizer.json").read_bytes() == (Path(recorded["data_folder"]) / "tokenizer.json").read_bytes()


def test_a_copy_without_times_is_evaluated_on_the_prepared_data() -> None:
    for path in Path().rglob("*"):
        os.utime(path, (time.time() - 1000,) * 2)
    assert evaluate_run() == metrics_lines(RUN)[-1]["val/loss"]
    assert len(list(Path("data").iterdir())) == 1


def test_a_run_is_evaluated_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, expected = RUN.resolve(), evaluate_run()
    monkeypatch.chdir(tmp_path)
    assert evaluate_run(str(run)) == expected


def test_the_recorded_content_is_found_in_another_folder() -> None:
    folder = Path(environment()["data_folder"])
    folder.rename("data/moved")
    Path("text.txt").unlink()
    assert evaluate_run() == resume() == metrics_lines(RUN)[-1]["val/loss"]


def test_data_that_is_gone_is_named() -> None:
    shutil.rmtree("data")
    recorded = environment()
    with pytest.raises(
        MoelmError,
        match=rf"{recorded['data_fingerprint']} in {recorded['data_folder']}, cannot be found from this directory",
    ):
        evaluate_run()
    Path("text.txt").write_text("something else\n" * 10 + "and more\n")
    prepare(load_config("dense.yaml").data)
    with pytest.raises(MoelmError, match=r"its inputs \(text.txt\) have changed"):
        evaluate_run()


def test_other_settings_of_the_data_are_named_as_such() -> None:
    with unchanged(RUN), pytest.raises(MoelmError, match=r"another data\.val_fraction; choose"):
        resume("data.val_fraction=0.3")
    with unchanged(RUN), pytest.raises(MoelmError, match=r"another data\.sources\.0\.path; choose"):
        resume("data.sources=[{path: gone.txt, documents: line}]")


def test_the_builtin_corpus_after_an_upgrade_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {i} of a package" for i in range(300)]
    monkeypatch.setattr(
        moelm.data.corpus.builtin, "builtin_documents", lambda: (Document(text, "code", text) for text in documents)
    )
    monkeypatch.setattr(moelm.data.sources, "builtin_fingerprint", lambda: str(len(documents)))
    settings = ("name=builtin", "data.sources=[{name: builtin}]", "train.steps=2")
    loss = resume(*settings)
    documents.append("a document of the upgraded package")
    expected = r"inputs \(builtin\) have changed .* or install the earlier versions of the packages that the builtin corpus"
    with unchanged(Path("runs/builtin")), pytest.raises(MoelmError, match=expected):
        resume(*settings)
    assert evaluate_run("builtin") == loss


def test_a_changed_tokenizer_file_is_named() -> None:
    Path("mine.json").write_bytes((RUN / "tokenizer.json").read_bytes())
    settings = ("name=own", "data.tokenizer={kind: file, path: mine.json}", "train.steps=2")
    resume(*settings)
    tree = json.loads(Path("mine.json").read_text())
    tree["model"]["vocab"] = {token: (id + 1) % len(tree["model"]["vocab"]) for token, id in tree["model"]["vocab"].items()}
    tree["added_tokens"] = []
    Path("mine.json").write_text(json.dumps(tree))
    with unchanged(Path("runs/own")), pytest.raises(MoelmError, match=r"its inputs \(mine.json\) have changed"):
        resume(*settings)


@pytest.mark.parametrize("file", ["tokenizer.json", "val-00000.bin", "val.documents.bin", "train.documents.bin"])
def test_prepared_files_that_have_changed_are_refused(file: str) -> None:
    path = Path(environment()["data_folder"]) / file
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b'"model"', b'"Model"') if file.endswith("json") else bytes([content[0] ^ 1]) + content[1:]
    )
    for use in (evaluate_run, resume):
        with pytest.raises(MoelmError, match=rf"is damaged: {file} is not as it was written"):
            use()


def test_another_tokenizer_in_the_runs_directory_is_refused() -> None:
    path = RUN / "tokenizer.json"
    path.write_text(path.read_text().replace("<|eos|>", "<|EOS|>"))
    for use in (evaluate_run, lambda: load_run("tiny-dense"), lambda: upcycle_run("tiny-dense", "sparse", 4, 2)):
        with pytest.raises(MoelmError, match=rf"{path} is not the tokenizer of this run: its hash is \w+ instead of \w+"):
            use()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no environment.json"),
        ("{", "is broken at line 1"),
        ("[]", "is not a JSON object"),
        ({"data_folder": None}, "has no data_folder, because an earlier version of moelm made the run"),
        ({"tokenizer_fingerprint": None}, "has no tokenizer_fingerprint"),
        ({"model": None}, "has no model, because an earlier version of moelm made the run"),
        ({"model": {}}, r"environment\.json, model: dim is missing"),
    ],
)
def test_a_run_without_a_record_is_refused(content: Any, message: str) -> None:
    path = RUN / "environment.json"
    if isinstance(content, dict):
        content = json.dumps({key: value for key, value in (environment() | content).items() if value is not None})
    path.unlink()
    if content is not None:
        path.write_text(content)
    for use in (evaluate_run, resume):
        with pytest.raises(MoelmError, match=message):
            use()


USES: dict[str, Callable[[], object]] = {
    "load": lambda: load_run("tiny-dense"),
    "eval": evaluate_run,
    "resume": resume,
    "resume with the run's own config": lambda: train(load_config(RUN / "config.yaml"), RunDirectory(RUN)),
    "init_from": lambda: resume("name=new", "init_from.run=tiny-dense", "model.rope_theta=500", "model.window=8"),
    "export": lambda: export_run("tiny-dense", Path("exported")),
    "upcycle": lambda: upcycle_run("tiny-dense", "sparse", 4, 2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    ("line", "edited", "message"),
    [
        (
            "rope_theta: 10000.0",
            "rope_theta: 500",
            "model.rope_theta=500.0, .* made with model.rope_theta=10000.0; restore it",
        ),
        ("rope_theta: 10000.0", "window: 8", "model.window=8, .* made with model.window=null; restore it"),
    ],
)
def test_an_edited_model_is_refused(use: Callable[[], object], line: str, edited: str, message: str) -> None:
    config = RUN / "config.yaml"
    config.write_text(config.read_text().replace(line, edited))
    with unchanged(RUN), pytest.raises(MoelmError, match=f"^{config} has {message}"):
        use()
    assert {path.name for path in Path("runs").iterdir() if (path / "config.yaml").exists()} == {"tiny-dense", "tiny-moe"}


@pytest.mark.parametrize("use", [lambda: load_run("sparse"), lambda: export_run("sparse", Path("exported"))])
def test_the_rate_of_a_bias_can_be_edited_but_not_whether_there_is_one(use: Callable[[], object]) -> None:
    config = upcycle_run("tiny-dense", "sparse", 4, 2, overrides=["model.ffn.balance.bias=0.01"]).config
    config.write_text(config.read_text().replace("bias: 0.01", "bias: 0.02"))
    load_run("sparse")
    config.write_text(config.read_text().replace("bias: 0.02", "bias: 0.0"))
    with pytest.raises(MoelmError, match=r"balance.bias=null, .* made with model.ffn.balance.bias=above 0; restore it"):
        use()


def test_an_edited_model_of_an_upcycled_run_is_refused() -> None:
    config = upcycle_run("tiny-dense", "sparse", 4, 2).config
    config.write_text(config.read_text().replace("top_k: 2", "top_k: 1"))
    with pytest.raises(MoelmError, match=f"^{config} has model.ffn.top_k=1, .* model.ffn.top_k=2; restore it"):
        load_run("sparse")


def test_edits_without_effect_on_the_weights_are_accepted() -> None:
    expected, config = evaluate_run(), RUN / "config.yaml"
    edits = {"init_std: 0.02": "init_std: 0.5", "num_heads: 2": "num_heads: 2\n  num_kv_heads: 2\n  head_dim: 8"}
    for before, after in edits.items():
        assert before in config.read_text()
        config.write_text(config.read_text().replace(before, after))
    assert evaluate_run() == expected


def test_an_upcycled_run_records_its_tokenizer_and_refuses_the_data_of_others() -> None:
    upcycle_run("tiny-dense", "sparse", 4, 2)
    evaluate_run("sparse")
    config = Path("runs/sparse/config.yaml")
    config.write_text(config.read_text().replace("kind: byte", "kind: char"))
    prepare(load_config(config).data)
    with pytest.raises(MoelmError, match="The weights of runs/sparse belong to another tokenizer than the data in data/"):
        evaluate_run("sparse")


def test_a_sweep_does_not_skip_a_finished_run_of_other_data() -> None:
    config = load_config("runs/tiny-dense/config.yaml")
    assert _is_finished(RunDirectory(RUN), config)
    Path("text.txt").write_text(Path("text.txt").read_text() + "one more line\n")
    with pytest.raises(MoelmError, match=r"its inputs \(text.txt\) have changed"):
        _is_finished(RunDirectory(RUN), config)


def test_a_tokenizer_that_loses_text_is_mentioned_beside_bits_per_byte(capsys: pytest.CaptureFixture[str]) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: number for number, word in enumerate(("cat", "dog", "the"), 3)}}
    raw = RawTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save("words.json")
    settings = ("data.tokenizer={kind: file, path: words.json}", "train.steps=2")
    prepare(load_config("dense.yaml", settings).data)
    capsys.readouterr()
    resume("name=words", *settings)
    assert capsys.readouterr().err.count(f"Warning: the tokenizer {LOSSY_NOTE}") == 1
    assert json.loads(Path("runs/words/environment.json").read_text())["lossy"] is True
    assert environment()["lossy"] is False
    for run, lossy in (("words", True), ("tiny-dense", False)):
        moelm.cli.eval_.evaluate(run)
        assert (f"The tokenizer {LOSSY_NOTE}" in capsys.readouterr().out) is lossy
        moelm.cli.eval_.evaluate(run, as_json=True)
        assert json.loads(capsys.readouterr().out)["lossy"] is lossy
    card = _validation_section(RunDirectory(Path("runs/words")), 2)
    assert card.endswith(f"The tokenizer {LOSSY_NOTE}\n\n")
