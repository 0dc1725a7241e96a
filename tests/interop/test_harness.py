"""The lm-evaluation-harness on a run, against the harness on its export through Hugging Face's library."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.errors import MoelmError
from moelm.interop.export import export_run
from moelm.rundir import load_run
from tests.conftest import Moelm
from tests.interop.test_export import DENSE, MOE, make

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from moelm.interop.harness import HarnessModel, evaluate_tasks

QUESTIONS = [
    {"text": "the red cat", "choices": [" sees", " hears a stone", " and"], "answer": 0},
    {"text": "a", "choices": [" bird likes the green house", " dog"], "answer": 1},
    {"text": "the old bird runs and the new dog sleeps but the cat ", "choices": ["hears", "sees"], "answer": 1},
    {"text": "", "choices": ["stone", "river"], "answer": 0},
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "guess": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}} {{choices|join(' ')}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}} ",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["s"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks whose data is a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))
    return folder


@pytest.fixture(params=["moe", "dense"])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of large random weights, whose continuations depend on their prompts, and its export."""
    monkeypatch.chdir(tmp_path)
    make("byte", MOE if request.param == "moe" else DENSE, {})
    export_run("run", tmp_path / "out")
    return tmp_path


def peer() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained="out", device="cpu", batch_size=2, dtype="float32")


@pytest.mark.usefixtures("here")
def test_figures_are_those_of_the_export(tasks: Path) -> None:
    ours = evaluate_tasks("run", list(TASKS), batch_size=3, include=tasks)["results"]
    manager = TaskManager(include_path=str(tasks))
    theirs = simple_evaluate(peer(), tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for task, figures in theirs.items():
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        assert numbers, task
        assert {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), task


@pytest.mark.usefixtures("here")
def test_answers_are_those_of_the_export() -> None:
    """Request by request; some are longer than the context, spell special tokens, or end in a space."""
    ours, theirs = HarnessModel(*load_run("run"), 2), peer()
    pairs = [
        ("the red cat", " sees"),
        ("a " * 60, "dog"),
        ("", "stone"),
        ("the <|bos|>cat ", "hears <|eos|>"),
        ("b", "a" * 64),
    ]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for own, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-4)
        assert own[1] == other[1]
    whole = [
        Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(["a " * 100, "dog", "<|eos|>"])
    ]
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-4)
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"max_gen_toks": 9}, {"max_gen_toks": 9, "repetition_penalty": 1.5}]
    prompts = ["the red cat", "b", "a bird likes the green house " * 4, "stone", "the old dog hears a <|eos|>", "river"]
    free = [Instance("generate_until", {}, (text, settings[n % 3]), n) for n, text in enumerate(prompts)]
    written = ours.generate_until(free)
    assert written == theirs.generate_until(free)
    assert len(set(written)) == len(prompts)


@pytest.mark.usefixtures("here")
def test_a_mistake_is_a_sentence(tasks: Path) -> None:
    for names, include, told in (
        (["choose", "nonsense"], tasks, "knows no task nonsense"),
        (["choose"], Path("nowhere"), "There is no folder nowhere"),
    ):
        with pytest.raises(MoelmError, match=told):
            evaluate_tasks("run", names, include=include)
    model = HarnessModel(*load_run("run"), 2)
    for pair, told in ((("a", "b" * 65), "has 65 tokens"), (("a", ""), "has 0 tokens")):
        with pytest.raises(MoelmError, match=told):
            model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    for wishes, told in (({"num_beams": 4, "max_gen_toks": 3}, "num_beams"), ({}, "256 new tokens")):
        with pytest.raises(MoelmError, match=told):
            model.generate_until([Instance("generate_until", {}, ("a", wishes), 0)])


@pytest.mark.usefixtures("here")
def test_names_may_be_patterns(tasks: Path) -> None:
    assert evaluate_tasks("run", ["cho*", " read"], include=tasks)["results"].keys() == {"choose", "read"}


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(moelm: Moelm, workplace: Path, tasks: Path) -> None:
    assert moelm("train", "dense.yaml", "train.steps=2").returncode == 0
    words = ("lm-eval", "tiny-dense", "--tasks", "choose, guess", "--include", str(tasks), "--limit", "3")
    assert "acc_norm" in moelm(*words).stdout
    told = json.loads(moelm(*words, "--json").stdout)
    assert told["n-samples"]["choose"]["effective"] == 3
