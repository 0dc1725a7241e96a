"""A sweep before it is trained: who takes part, equal on which axis, and for how long."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.errors import MoelmError
from moelm.sweep.match import size_on
from moelm.sweep.plan import Entry, plan_sweep
from moelm.sweep.schema import Entrant, SweepConfig, entrants_of, load_sweep

SHIPPED = sorted(path for path in Path(__file__).parents[2].glob("configs/sweeps/*.yaml") if path.stem != "base")
SPARSE = {"kind": "moe", "hidden_dim": 16, "num_experts": 8, "top_k": 2}


def plan(folder: Path, *overrides: str, **settings: Any) -> list[Entry]:
    tree = {"name": "study", "config": "dense.yaml", "contestants": {"dense": {}, "moe": {"model.ffn": SPARSE}}, **settings}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with contextlib.chdir(folder):
        path = Path("sweep.yaml")
        return plan_sweep(path, load_sweep(path), overrides)


def test_contestants_are_the_named_ones_and_then_the_grid() -> None:
    sweep = SweepConfig(
        name="s",
        config="c.yaml",
        contestants={"a dense one": {"model.ffn.kind": "dense"}},
        grid={"model.ffn.num_experts": [4, 8], "model.ffn.router": [{"kind": "topk"}, {"kind": "hash"}]},
    )
    found = entrants_of(sweep)
    assert found[0] == Entrant("a-dense-one", ['model.ffn.kind="dense"'])
    assert [each.label for each in found[1:]] == [
        f"num_experts-{count}-router-{kind}" for count in (4, 8) for kind in ("topk", "hash")
    ]
    assert found[2].words == ["model.ffn.num_experts=4", 'model.ffn.router={"kind": "hash"}']


def test_runs_are_named_and_seeded(workplace: Path) -> None:
    dense, moe = plan(workplace, "train.steps=6", seeds=[3, 5])
    assert [run.path.name for run in moe.runs.values()] == ["study-moe-3", "study-moe-5"]
    assert moe.config.train.steps == 6
    assert moe.command(5)[:2] == ["train", "dense.yaml"]
    assert moe.command(5)[-2:] == ["seed=5", "name=study-moe-5"]
    assert dense.config.model.vocab_size == moe.config.model.vocab_size == 258


@pytest.mark.parametrize("match", ["active_params", "flops_per_token", "total_params"])
def test_widths_are_made_to_match(workplace: Path, match: Any) -> None:
    contestants = {"dense": {"model.ffn.hidden_dim": 500}, "moe": {"model.ffn": SPARSE}}
    dense, moe = plan(workplace, match=match, contestants=contestants)
    assert dense.config.model.ffn.hidden_dim == 500
    assert size_on(moe.config, match) == pytest.approx(size_on(dense.config, match), rel=0.01)
    assert f"model.ffn.hidden_dim={moe.config.model.ffn.hidden_dim}" in moe.words


def test_what_matches_already_stays_as_it_is(workplace: Path) -> None:
    wide = {**SPARSE, "hidden_dim": 500}
    contestants = {"dense": {"model.ffn.hidden_dim": 1000}, "moe": {"model.ffn": wide}}
    assert plan(workplace, match="flops_per_token", contestants=contestants)[1].config.model.ffn.hidden_dim == 500


def test_widths_stay_divisible_into_layers(workplace: Path) -> None:
    contestants = {"dense": {"model.ffn.hidden_dim": 200}, "deep": {"model.ffn": {**SPARSE, "depth": 4}}}
    deep = plan(workplace, match="flops_per_token", contestants=contestants)[1].config.model.ffn
    assert deep.hidden_dim % 4 == 0


def test_what_cannot_match_is_refused(workplace: Path) -> None:
    with pytest.raises(MoelmError, match=r"study-moe cannot be made equal in total parameters .*more than 1% away"):
        plan(
            workplace, match="total_params", contestants={"dense": {}, "moe": {"model.ffn": {**SPARSE, "num_experts": 64}}}
        )


def test_words_for_all_do_not_undo_what_is_decided(workplace: Path) -> None:
    with pytest.raises(MoelmError, match=r"hidden_dim cannot be set for all .* whose match decides it"):
        plan(workplace, "model.ffn.hidden_dim=64", match="flops_per_token")
    with pytest.raises(MoelmError, match=r"'train\.steps=4' cannot be set in the sweep study, whose budget decides it"):
        plan(workplace, "train.steps=4", budget={"tokens": 1000})


def test_a_contestant_without_settings_is_the_config(workplace: Path) -> None:
    dense, _ = plan(workplace, contestants={"dense": None, "moe": {"model.ffn": SPARSE}})
    assert dense.words == []


def test_a_budget_decides_the_steps(workplace: Path) -> None:
    assert [entry.config.train.steps for entry in plan(workplace, budget={"tokens": 1000})] == [3, 3]
    entries = plan(workplace, budget={"flops": 1e9})
    for entry in entries:
        each = entry.flops // entry.config.train.steps
        assert entry.flops <= 1e9 < entry.flops + each
    with pytest.raises(MoelmError, match="The budget does not pay for one step of study-dense, which costs 256"):
        plan(workplace, budget={"tokens": 255})


@pytest.mark.slow
def test_a_budget_of_seconds_is_timed(workplace: Path) -> None:
    dense, moe = (entry.config.train.steps for entry in plan(workplace, budget={"seconds": 30}))
    assert moe > 30
    assert dense > 30


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"contestants": {"one": {}}}, "The sweep study has 1 contestant; at least two are expected"),
        ({"contestants": {"a b": {}, "a-b": {}}}, "two contestants called a-b"),
        ({"contestants": {"a": {}, "b": {"seed": 1}}}, "'seed=1' cannot be set in the sweep"),
        ({"contestants": {"a": {}, "b": {"model.ffn.hidden_dim": 32}}}, "a and b have the same settings"),
        ({"seeds": [1, 1]}, r"has the seeds \[1, 1\]; each of them once"),
        ({"budget": {"tokens": 1, "flops": 1}}, "budget names tokens and flops; one of tokens, flops, seconds"),
        ({"budget": {}}, "budget names nothing"),
        ({"match": "size"}, "match is 'size', but it should be 'active_params', 'flops_per_token' or 'total_params'"),
        ({"config": "none.yaml"}, "There is no config file none.yaml"),
        ({"sedes": [1]}, "there is no setting sedes; did you mean seeds"),
        ({"contestants": {"a": {"name": "x"}, "b": {}}}, "cannot be set in the sweep study, which names its runs itself"),
        ({"contestants": {"a": {}, "b": {"train.steps": 9}}, "budget": {"tokens": 999}}, "study, whose budget decides it"),
        ({"contestants": {"a": {}, "b": {"data.seq_len": 16}}}, "a and b differ in data.seq_len, so their losses"),
        ({"contestants": {"a": {}, ";": {}}}, "a contestant whose name holds no letter or digit"),
        ({"seeds": [0, -1]}, "seeds.1 is -1, but it should be greater than or equal to 0"),
        ({"budget": {"tokens": float("inf")}}, "budget.tokens is inf, but it should be a finite number"),
        ({"contestants": {"a": {"model.ffn.hiden_dim": 4}, "b": {}}}, "Contestant a: .*did you mean hidden_dim"),
        ({"contestants": ["a", "b"]}, "contestants is .* but it should be a section of settings"),
    ],
)
def test_mistakes_are_sentences(workplace: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MoelmError, match=sentence):
        plan(workplace, **settings)
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_equal_where_they_say_so(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.match is not None
    entries = plan_sweep(path, sweep, ["model.vocab_size=2048"])
    target = size_on(entries[0].config, sweep.match)
    assert all(size_on(entry.config, sweep.match) == pytest.approx(target, rel=0.01) for entry in entries)
