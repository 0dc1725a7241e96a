"""The lm-evaluation-harness on a run, compared with the harness's `hf` model on the exported run."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.cli.lm_eval import print_results
from moelm.errors import MoelmError
from moelm.huggingface.export import export_run
from moelm.runs.load import load_run
from tests.conftest import Moelm
from tests.huggingface.test_export import DENSE, MOE, create_random_run

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from moelm.evaluation import harness
from moelm.evaluation.harness import HarnessModel, evaluate_tasks

RTOL = 2e-6
"""Relative tolerance of float32 log-likelihoods, which are sums over tokens; those of the two models differ by 2e-7."""

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
    "complete": {
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


@pytest.fixture(autouse=True)
def only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness needs seconds to read the thousands of its own tasks; the test of the command does that."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))


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
def random_run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with large random weights, whose continuations depend on the prompts, and its export in `out`."""
    monkeypatch.chdir(tmp_path)
    create_random_run("byte", MOE if request.param == "moe" else DENSE, {})
    export_run("run", tmp_path / "out")


def hf_harness_model() -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained="out", device="cpu", batch_size=2, dtype="float32")


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """The numeric results of a task; perplexities, and their errors, as logarithms."""
    values = {key: value for key, value in results.items() if isinstance(value, float)}
    return {key: math.log(value) if "perplexity" in key else value for key, value in values.items()}


@pytest.mark.usefixtures("random_run")
def test_results_equal_those_of_the_export(tasks: Path) -> None:
    results = evaluate_tasks("run", list(TASKS), batch_size=3, include=tasks)["results"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(hf_harness_model(), tasks=list(TASKS), task_manager=manager, log_samples=False)["results"]
    assert results.keys() == expected.keys() == TASKS.keys()
    for task in TASKS:
        assert numbers(expected[task]), task
        assert numbers(results[task]) == pytest.approx(numbers(expected[task]), rel=RTOL), task


@pytest.mark.usefixtures("random_run")
def test_answers_equal_those_of_the_export() -> None:
    """Request by request; some are longer than the context, spell special tokens, or end in a space."""
    model, hf_model = HarnessModel(*load_run("run"), 2), hf_harness_model()
    pairs = [
        ("the red cat", " sees"),
        ("a " * 60, "dog"),
        ("", "stone"),
        ("the <|bos|>cat ", "hears <|eos|>"),
        ("b", "a" * 64),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for score, (log_likelihood, is_greedy) in zip(
        model.loglikelihood(requests), hf_model.loglikelihood(requests), strict=True
    ):
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=RTOL)
        assert score.is_greedy == is_greedy
    texts = ["a " * 100, "dog", "<|eos|>"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    assert model.loglikelihood_rolling(requests) == pytest.approx(hf_model.loglikelihood_rolling(requests), rel=RTOL)
    settings: list[dict[str, Any]] = [
        {"until": ["e"], "max_gen_toks": 12},
        {"max_gen_toks": 9},
        {"max_gen_toks": 9, "repetition_penalty": 1.5},
    ]
    prompts = ["the red cat", "b", "a bird likes the green house " * 4, "stone", "the old dog hears a <|eos|>", "river"]
    requests = [Instance("generate_until", {}, (text, settings[n % 3]), n) for n, text in enumerate(prompts)]
    continuations = model.generate_until(requests)
    assert continuations == hf_model.generate_until(requests)
    no_limit = [Instance("generate_until", {}, ("b", {"max_gen_toks": 9, "do_sample": True, "top_k": 0}), 0)]
    assert model.generate_until(no_limit)
    greedy = [{**each, "do_sample": False, "temperature": 0.0} for each in settings]
    requests = [Instance("generate_until", {}, (text, greedy[n % 3]), n) for n, text in enumerate(prompts)]
    assert model.generate_until(requests) == continuations
    assert not model.lossy
    assert len(set(continuations)) == len(prompts)


def test_a_tokenizer_that_loses_text_is_told(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    create_random_run("char", DENSE, {})
    evaluate_tasks("run", ["read"], include=tasks)
    assert "bits per byte are those of the rest" in capsys.readouterr().err


@pytest.mark.usefixtures("random_run")
def test_errors(tasks: Path, tmp_path: Path) -> None:
    for names, include, message in (
        (["choose", "nonsense"], tasks, "has no task nonsense"),
        (["choose"], Path("nowhere"), "There is no folder nowhere"),
    ):
        with pytest.raises(MoelmError, match=message):
            evaluate_tasks("run", names, include=include)
    for change, message in (
        ({"doc_to_target": "{{nonsense}}"}, "cannot evaluate broken: UndefinedError: 'nonsense' is undefined"),
        ({"test_split": "nonsense"}, "cannot evaluate broken: KeyError: 'nonsense'"),
    ):
        task = yaml.safe_load((tasks / "read.yaml").read_text(encoding="utf-8")) | {"task": "broken"} | change
        (tmp_path / "broken.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        with pytest.raises(MoelmError, match=message):
            evaluate_tasks("run", ["broken"], include=tmp_path)
    model = HarnessModel(*load_run("run"), 2)
    for pair, message in ((("a", "b" * 65), "has 65 tokens"), (("a", ""), "has 0 tokens")):
        with pytest.raises(MoelmError, match=message):
            model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    for generation_kwargs, message in (({"num_beams": 4, "max_gen_toks": 3}, "num_beams"), ({}, "256 new tokens")):
        with pytest.raises(MoelmError, match=message):
            model.generate_until([Instance("generate_until", {}, ("a", generation_kwargs), 0)])


@pytest.mark.usefixtures("random_run")
def test_task_names_may_be_patterns(tasks: Path) -> None:
    assert evaluate_tasks("run", ["cho*", " read"], include=tasks)["results"].keys() == {"choose", "read"}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_command_prints_a_table_or_json(
    moelm: Moelm, workplace: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelm("train", "dense.yaml", "train.steps=2").returncode == 0
    argv = ("lm-eval", "tiny-dense", "--tasks", "choose, complete", "--include", str(tasks), "--limit", "3")
    results = json.loads(moelm(*argv, "--json").stdout)
    assert results["n-samples"]["choose"]["effective"] == 3
    print_results(results)
    assert "acc_norm" in capsys.readouterr().out
