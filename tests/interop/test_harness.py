"""The lm-evaluation-harness on a run, against the harness on its export through Hugging Face's library."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.errors import MoelmError
from moelm.interop.export import export_run
from tests.conftest import Moelm

pytest.importorskip("lm_eval")

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


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_figures_are_those_of_the_export(kind: str, trained: Path, tasks: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from moelm.interop.harness import evaluate_tasks

    with contextlib.chdir(trained):
        export_run(f"tiny-{kind}", tmp_path / "out")
        ours = evaluate_tasks(f"tiny-{kind}", list(TASKS), batch_size=3, include=tasks)["results"]
    peer = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2, dtype="float32")
    manager = TaskManager(include_path=str(tasks))
    theirs = simple_evaluate(peer, tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for task, figures in theirs.items():
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        assert numbers, task
        assert {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), task


def test_continuations_are_those_of_the_export(trained: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from moelm.interop.harness import HarnessModel
    from moelm.rundir import load_run

    with contextlib.chdir(trained):
        export_run("tiny-moe", tmp_path / "out")
        ours = HarnessModel(*load_run("tiny-moe"), 2)
    theirs = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2, dtype="float32")
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"max_gen_toks": 5}]
    asked = [
        Instance("generate_until", {}, (question["text"] or "b", settings[number % 2]), number)
        for number, question in enumerate(QUESTIONS)
    ]
    written = ours.generate_until(asked)
    assert written == theirs.generate_until(asked)
    assert any(written)


def test_a_mistake_is_a_sentence(trained: Path, tasks: Path) -> None:
    from moelm.interop.harness import evaluate_tasks

    with contextlib.chdir(trained), pytest.raises(MoelmError, match="knows no task nonsense"):
        evaluate_tasks("tiny-moe", ["choose", "nonsense"], include=tasks)


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(moelm: Moelm, workplace: Path, tasks: Path) -> None:
    assert moelm("train", "dense.yaml", "train.steps=2").returncode == 0
    words = ("lm-eval", "tiny-dense", "--tasks", "choose,read", "--include", str(tasks), "--limit", "3")
    assert "acc_norm" in moelm(*words).stdout
    told = json.loads(moelm(*words, "--json").stdout)
    assert told["n-samples"]["choose"]["effective"] == 3
