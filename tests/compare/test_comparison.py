"""Comparisons of runs with linear losses, for which all expected numbers can be computed by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from moelm.compare.axes import cost_with_unit
from moelm.compare.pairwise import EqualCost
from moelm.compare.reading import cost_at_loss
from moelm.errors import MoelmError
from moelm.formats import duration, exponent, quantity
from moelm.runs.record import read_run, read_runs
from tests.compare.linear_runs import MOE, compared, write_run


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """A dense run from 5 to 3, and an MoE run from 5 to 1.8 with twice the FLOPs and time per token."""
    dense = write_run(tmp_path / "dense", slope=0.5)
    return [dense, write_run(tmp_path / "moe", slope=0.8, ffn=MOE, flops=2e9, seconds=0.2)]


def test_a_run_is_read(pair: list[Path]) -> None:
    run = read_run(pair[1])
    assert run.name == "moe"
    assert run.config.model.ffn.kind == "moe"
    assert run.val.tokens.tolist() == [0, 100_000, 200_000, 300_000, 400_000]
    assert run.val.loss == pytest.approx([5, 4.2, 3.4, 2.6, 1.8])
    assert len(run.train) == 8
    assert run.tokens_per_second == 5000
    assert run.memory_peak == 2**30 + 400
    assert run.flops_per_token == 120_000
    assert run.domains_at[400]["code"]["loss"] == pytest.approx(2.3)
    assert run.load is not None
    assert run.load.share.shape == (8, 2, 4)
    assert run.load.max_over_mean[-1].tolist() == [1.6, 2.6]
    assert read_run(pair[0]).load is None


def test_a_bare_name_is_looked_up_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "here", slope=0.5)
    monkeypatch.chdir(tmp_path)
    assert read_run("here").path == Path("runs/here")


def test_runs_with_the_same_name_are_named_by_path(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / "same", slope=0.5) for folder in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]


def test_the_last_line_of_a_step_counts(pair: list[Path]) -> None:
    again = {"step": 400, "tokens": 400_000, "flops": 4e11, "time_s": 40.0, "val/loss": 2.5, "val/bpb": 1.2}
    with (pair[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert read_run(pair[0]).val.loss.tolist() == [5, 4.5, 4, 3.5, 2.5]


def test_cost_to_reach_of_linear_losses(pair: list[Path]) -> None:
    comparison = compared(pair)
    forth = comparison.pair("moe", "dense")
    assert forth.target_loss == pytest.approx(3.0)
    assert {axis: reached.cost for axis, reached in forth.cost_to_reach.items()} == pytest.approx(
        {"tokens": 250_000, "flops": 5e11, "seconds": 50}
    )
    assert {axis: reached.ratio for axis, reached in forth.cost_to_reach.items()} == pytest.approx(
        {"tokens": 1.6, "flops": 0.8, "seconds": 0.8}
    )
    back = comparison.pair("dense", "moe")
    assert [reached.cost for reached in back.cost_to_reach.values()] == [None] * 3
    assert [reached.ratio for reached in back.cost_to_reach.values()] == [None] * 3


def test_losses_at_equal_cost(pair: list[Path]) -> None:
    equal = compared(pair).pair("moe", "dense").equal_cost
    assert equal["tokens"] is not None
    assert equal["flops"] is not None
    assert equal["seconds"] is not None
    assert (equal["tokens"].at, equal["tokens"].gain) == pytest.approx((400_000, 1.2))
    assert (equal["flops"].at, equal["flops"].loss_a) == pytest.approx((4e11, 3.4))
    assert (equal["seconds"].at, equal["seconds"].gain) == pytest.approx((40, -0.4))


def test_a_split_result(pair: list[Path]) -> None:
    verdict = compared(pair).verdict
    assert verdict.winner is None
    assert verdict.sentence == (
        "Split result: against dense, moe's validation loss is "
        "1.200 nats lower at equal tokens (1.800 against 3.000), "
        "0.400 nats higher at equal FLOPs (3.400 against 3.000) and "
        "0.400 nats higher at equal wall-clock (3.400 against 3.000)."
    )
    assert verdict.efficiency == (
        "moe reaches dense's final loss of 3.000 with 1.60× fewer tokens (250K against 400K), "
        "1.25× more FLOPs (5.0e11 against 4.0e11) and 1.25× more time (50.0 s against 40.0 s)."
    )


@pytest.mark.parametrize(
    ("slopes", "winner", "head"),
    [
        ((0.5, 0.6), "b", "b wins: against a, its"),
        ((0.6, 0.5), "a", "a wins: against b, its"),
        ((0.5, 0.501), None, "Tie: against a, b's"),
    ],
)
def test_verdict_at_equal_speed(tmp_path: Path, slopes: tuple[float, float], winner: str | None, head: str) -> None:
    runs = [write_run(tmp_path / name, slope=slope) for name, slope in zip("ab", slopes, strict=True)]
    verdict = compared(runs).verdict
    assert verdict.winner == winner
    assert verdict.sentence.startswith(head)


def test_better_by_tokens_and_equal_by_flops_is_a_win_in_part(tmp_path: Path) -> None:
    # The loss of the second run falls 1.25 times as fast by token, at 1.25 times the FLOPs: equal by FLOPs.
    runs = [write_run(tmp_path / "a", slope=0.4), write_run(tmp_path / "b", slope=0.5, flops=1.25e9)]
    verdict = compared(runs).verdict
    assert verdict.winner is None
    assert verdict.sentence.startswith("b wins in part: against a, its validation loss is 0.400 nats lower")
    assert "the same within 0.005 nats at equal FLOPs (3.400 against 3.400)" in verdict.sentence


def test_five_thousandths_are_no_tie() -> None:
    assert not EqualCost(1, 2.860, 2.865).tie
    assert EqualCost(1, 2.8601, 2.865).tie


def test_the_best_of_several_runs_is_compared_with_the_reference(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, slope=slope) for name, slope in (("a", 0.5), ("b", 0.6), ("c", 0.7))]
    comparison = compared(runs)
    assert comparison.challenger == "c"
    assert comparison.verdict.winner == "c"
    assert len(comparison.pairs) == 6


def test_cost_at_loss_uses_the_running_minimum() -> None:
    x = np.array([0.0, 1, 2, 3])
    bumpy = np.array([5.0, 3, 4, 2])
    assert cost_at_loss(x, bumpy, 4) == 0.5
    assert cost_at_loss(x, bumpy, 2.5) == 2.5  # from the best so far, 3, and not from the bump at 4
    assert cost_at_loss(x, bumpy, 5) == 0
    assert cost_at_loss(x, bumpy, 1.9) is None


def test_without_a_common_cost_there_is_no_result(tmp_path: Path) -> None:
    early, late = (write_run(tmp_path / name, slope=0.5) for name in ("early", "late"))
    lines = [json.loads(text) for text in (late / "metrics.jsonl").read_text().splitlines()]
    late_lines = [json.dumps(line | {"flops": 10 * line["flops"]}) for line in lines if line["step"] > 200]
    (late / "metrics.jsonl").write_text("\n".join(late_lines) + "\n")
    equal = compared([early, late]).pair("early", "late").equal_cost
    assert equal["flops"] is None
    assert equal["tokens"] is not None


def test_equal_and_different_sizes_are_named(pair: list[Path]) -> None:
    assert compared(pair).verdict.sizes == (
        "moe and dense are equal in active parameters and FLOPs per token (within 3%); "
        "moe has 2.00× the total parameters (40.0K against 20.0K)."
    )


def test_notes(tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", slope=0.5, schedule="cosine")
    moe = write_run(tmp_path / "moe", slope=0.8, flops=2e9, schedule="cosine", environment={"device": "cuda"})
    config = (moe / "config.yaml").read_text()
    (moe / "config.yaml").write_text(config.replace("steps: 400", "steps: 500"))
    notes = compared([dense, moe]).notes
    assert notes[0] == "moe was last evaluated at step 400 of 500."
    assert any(note.startswith("At equal FLOPs, moe is compared at 50% of its training") for note in notes)
    assert "Times are not comparable: device differs (cpu, cuda)." in notes
    assert notes[-1] == "All runs share seed 0; the spread between seeds is not measured here."
    text = (moe / "config.yaml").read_text()
    (moe / "config.yaml").write_text(f"{text}init_from: {{run: other}}\n")
    notes = compared([dense, moe]).notes
    assert "moe was initialized from other, whose training cost is not included." in notes


def test_a_different_optimizer_is_noted(tmp_path: Path) -> None:
    adamw, muon = (write_run(tmp_path / name, slope=0.5) for name in ("adamw", "muon"))
    costs = "FLOPs are those of the model, so the cost of the update is only in the time."
    note = f"The optimizer differs (adamw, muon); {costs}"
    assert not any(costs in note for note in compared([adamw, muon]).notes)
    config = yaml.safe_load((muon / "config.yaml").read_text())
    config["optim"]["kind"] = "muon"
    (muon / "config.yaml").write_text(yaml.safe_dump(config))
    comparison = compared([adamw, muon])
    assert note in comparison.notes
    assert comparison.config_differences["optim.kind"] == {"adamw": "adamw", "muon": "muon"}
    config["optim"]["groups"] = {"experts": {"optimizer": "adamw"}}
    (muon / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"The optimizer differs (adamw, muon with adamw for experts); {costs}" in compared([adamw, muon]).notes


def test_config_differences_are_dotted_and_leave_out_the_name(pair: list[Path]) -> None:
    differences = compared(pair).config_differences
    assert differences["model.ffn.kind"] == {"dense": "dense", "moe": "moe"}
    assert differences["model.ffn.num_experts"] == {"dense": None, "moe": 4}
    assert all(key.startswith("model.ffn.") for key in differences)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data_fingerprint", "were trained on different data, so their losses differ for that reason too"),
        ("tokenizer_fingerprint", r"differ in tokenizer, so .* not comparable \(only bits per byte are\)"),
        ("eval_fingerprint", "differ in evaluation set, so their losses are not comparable"),
    ],
)
def test_runs_on_other_data_are_refused_unless_forced(tmp_path: Path, key: str, message: str) -> None:
    a = write_run(tmp_path / "a", slope=0.5)
    b = write_run(tmp_path / "b", slope=0.6, environment={key: "other"})
    with pytest.raises(MoelmError, match=rf"a and b {message}.*--force"):
        compared([a, b])
    forced = compared([a, b], force=True)
    assert len(forced.warnings) == 1
    assert forced.verdict.winner == "b"


def test_a_tokenizer_that_loses_text_is_noted(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", slope=0.5)
    b = write_run(tmp_path / "b", slope=0.6, environment={"lossy": True})
    notes = compared([a, b]).notes
    assert [note.split(" loses ")[0] for note in notes if " loses " in note] == ["The tokenizer of b"]
    c = write_run(tmp_path / "c", slope=0.6, environment={"lossy": True, "tokenizer_fingerprint": "other"})
    with pytest.raises(MoelmError, match=r"a and c differ in tokenizer, so their losses are not comparable\. Use"):
        compared([a, c])


def test_one_run_is_refused(pair: list[Path]) -> None:
    with pytest.raises(MoelmError, match="at least two variants"):
        compared(pair[:1])


def test_a_run_given_twice_is_refused(pair: list[Path]) -> None:
    with pytest.raises(MoelmError, match="dense is given twice"):
        read_runs([pair[0], pair[0] / "."])


def test_missing_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MoelmError, match=r"no run ghost; a directory with a config\.yaml, or a name under runs/, is expected"
    ):
        read_run("ghost")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoelmError, match=r"no run empty; a directory with a config\.yaml"):
        read_run("empty")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", None, "dense has no metrics.jsonl"),
        ("metrics.jsonl", "", "dense has no evaluation yet"),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 1, "flops": 1, "time_s": 1}\n{"st',
            "metrics.jsonl, line 2 is not JSON",
        ),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1 is not a JSON object"),
        ("metrics.jsonl", '\n{"step": 1, "tokens": 1, "flops": 1}\n', "line 2: time_s is missing"),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 1, "flops": 1, "time_s": 1, "val/loss": NaN, "val/bpb": 1}\n',
            "line 1: val/loss is NaN; a finite number",
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 2, "flops": 1, "time_s": 1, "val/loss": 2, "val/bpb": 1}\n'
            '{"step": 2, "tokens": 1, "flops": 1, "time_s": 1, "val/loss": 2, "val/bpb": 1}\n',
            "tokens goes back at step 2",
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 2, "flops": 1, "time_s": 1, "val/loss": 2, "val/bpb": 1, '
            '"moe/layers": [{"layer": 0}]}\n',
            "moe/layers must hold the same layers",
        ),
        ("environment.json", None, "dense has no environment.json"),
        ("environment.json", "{\n,", "environment.json is broken at line 2"),
        ("environment.json", "[]", "environment.json is not a JSON object"),
        ("environment.json", b"\xff\xfe", "environment.json is not a text file"),
        ("config.yaml", "name: [", "config.yaml is not valid YAML"),
    ],
)
def test_damaged_runs_are_refused(pair: list[Path], file: str, text: str | bytes | None, message: str) -> None:
    path = pair[0] / file
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(MoelmError) as error:
        read_run(pair[0])
    assert message in str(error.value)
    assert str(pair[0]) in str(error.value)


def test_number_formats() -> None:
    counts = (0, 850, 999.7, 4_915_200, 46_702_792_704, 181_000_000, 99_960)
    assert [quantity(x) for x in counts] == ["0", "850", "1.0K", "4.9M", "46.7B", "181M", "100K"]
    assert [exponent(x) for x in (1.2e15, 123_000.0)] == ["1.2e15", "1.2e5"]
    assert [duration(x) for x in (41.23, 512, 9000)] == ["41.2 s", "8.5 min", "2.5 h"]
    assert cost_with_unit("tokens", 4_915_200) == "4.9M tokens"


def test_a_machine_that_was_not_idle_is_noted(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, slope=0.5, seconds=0.1, environment={"cpus": 2}) for name in "ab")
    lines = [json.loads(text) for text in (b / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line |= {"perf/cpu_others": 0.9, "perf/cpu_steal": 0.0}
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(b, tmp_path / "half")
    environment = {**json.loads((b / "environment.json").read_text()), "threads": 1, "processes": 1}
    (tmp_path / "half/environment.json").write_text(json.dumps(environment))
    assert not [each for each in compared([a, tmp_path / "half"]).notes if "not idle" in each]
    note = "The machine was not idle while b trained (other processes used 0.9 of 2 CPUs); its times are uncertain."
    assert [each for each in compared([a, b]).notes if "not idle" in each] == [note]
    others = [shutil.copytree(b, tmp_path / f"c{number}") for number in range(5)]
    (note,) = (each for each in compared([a, b, *others]).notes if "not idle" in each)
    assert note == (
        "The machine was not idle while b, c0, c1 and 3 other runs trained (in the worst case, other processes used "
        "0.9 of 2 CPUs); their times are uncertain."
    )
