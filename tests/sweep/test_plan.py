"""A sweep before training: its variants, matching sizes and numbers of steps."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelm.errors import MoelmError
from moelm.sweep.config import SweepConfig, load_sweep, variant_overrides
from moelm.sweep.match import model_size
from moelm.sweep.plan import plan_sweep
from moelm.sweep.variant import SweepVariant

SWEEPS = Path(__file__).parents[2] / "configs/sweeps"
MATCHED = sorted(path for path in SWEEPS.glob("*.yaml") if path.stem not in ("base", "ladder-base", "dense-width"))
SPARSE = {"kind": "moe", "hidden_dim": 16, "num_experts": 8, "top_k": 2}


def plan(folder: Path, *overrides: str, **settings: Any) -> list[SweepVariant]:
    tree = {"name": "study", "config": "dense.yaml", "variants": {"dense": {}, "moe": {"model.ffn": SPARSE}}, **settings}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with contextlib.chdir(folder):
        path = Path("sweep.yaml")
        return plan_sweep(path, load_sweep(path), overrides)


def test_variants_are_the_listed_ones_and_then_the_grid() -> None:
    sweep = SweepConfig(
        name="s",
        config="c.yaml",
        variants={"a dense one": {"model.ffn.kind": "dense"}},
        grid={"model.ffn.num_experts": [4, 8], "model.ffn.router": [{"kind": "topk"}, {"kind": "hash"}]},
    )
    overrides = variant_overrides(sweep)
    assert list(overrides) == [
        "a-dense-one",
        *(f"num_experts-{count}-router-{kind}" for count in (4, 8) for kind in ("topk", "hash")),
    ]
    assert overrides["a-dense-one"] == ["model.ffn.kind=dense"]
    assert overrides["num_experts-4-router-hash"] == ["model.ffn.num_experts=4", "model.ffn.router={kind: hash}"]


def test_runs_are_named_and_seeded(workplace: Path) -> None:
    dense, moe = plan(workplace, "train.steps=6", seeds=[3, 5])
    assert [run.path.name for run in moe.runs.values()] == ["study-moe-3", "study-moe-5"]
    assert moe.config.train.steps == 6
    assert moe.train_arguments(5)[:2] == ["train", "dense.yaml"]
    assert moe.train_arguments(5)[-2:] == ["seed=5", "name=study-moe-5"]
    assert dense.config.model.vocab_size == moe.config.model.vocab_size == 258


@pytest.mark.parametrize("match", ["active_params", "flops_per_token", "total_params"])
def test_widths_are_chosen_to_match(workplace: Path, match: Any) -> None:
    variants = {"dense": {"model.ffn.hidden_dim": 500}, "moe": {"model.ffn": SPARSE}}
    dense, moe = plan(workplace, match=match, variants=variants)
    assert dense.config.model.ffn.hidden_dim == 500
    assert model_size(moe.config, match) == pytest.approx(model_size(dense.config, match), rel=0.01)
    assert f"model.ffn.hidden_dim={moe.config.model.ffn.hidden_dim}" in moe.overrides


def test_a_matching_width_is_unchanged(workplace: Path) -> None:
    wide = {**SPARSE, "hidden_dim": 500}
    variants = {"dense": {"model.ffn.hidden_dim": 1000}, "moe": {"model.ffn": wide}}
    assert plan(workplace, match="flops_per_token", variants=variants)[1].config.model.ffn.hidden_dim == 500


def test_chosen_widths_are_divisible_by_the_depth(workplace: Path) -> None:
    variants = {"dense": {"model.ffn.hidden_dim": 200}, "deep": {"model.ffn": {**SPARSE, "depth": 4}}}
    deep = plan(workplace, match="flops_per_token", variants=variants)[1].config.model.ffn
    assert deep.hidden_dim % 4 == 0


def test_an_impossible_match_is_refused(workplace: Path) -> None:
    with pytest.raises(
        MoelmError, match=r"study-moe cannot have as many total parameters as the first variant .*more than 1% away"
    ):
        plan(workplace, match="total_params", variants={"dense": {}, "moe": {"model.ffn": {**SPARSE, "num_experts": 64}}})


def test_shared_overrides_cannot_set_what_match_or_budget_determines(workplace: Path) -> None:
    with pytest.raises(MoelmError, match=r"hidden_dim cannot be set for all .* whose match determines it"):
        plan(workplace, "model.ffn.hidden_dim=64", match="flops_per_token")
    with pytest.raises(MoelmError, match=r"'train\.steps=4' cannot be set in the sweep study, whose budget determines it"):
        plan(workplace, "train.steps=4", budget={"tokens": 1000})


def test_a_variant_without_settings_is_the_config(workplace: Path) -> None:
    dense, _ = plan(workplace, variants={"dense": None, "moe": {"model.ffn": SPARSE}})
    assert dense.overrides == []


def test_a_budget_determines_the_steps(workplace: Path) -> None:
    assert [variant.config.train.steps for variant in plan(workplace, budget={"tokens": 1000})] == [3, 3]
    for variant in plan(workplace, budget={"flops": 1e9}):
        step = variant.flops // variant.config.train.steps
        assert variant.flops <= 1e9 < variant.flops + step
    with pytest.raises(MoelmError, match="The budget is too small for one step of study-dense, which costs 256"):
        plan(workplace, budget={"tokens": 255})


@pytest.mark.slow
def test_a_budget_of_seconds_is_measured(workplace: Path) -> None:
    dense, moe = (variant.config.train.steps for variant in plan(workplace, budget={"seconds": 30}))
    assert moe > 30
    assert dense > 30


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"variants": {"one": {}}}, "The sweep study has 1 variant; at least two are expected"),
        ({"variants": {"a b": {}, "a-b": {}}}, "two variants with the label a-b"),
        ({"variants": {"a": {}, "b": {"seed": 1}}}, "'seed=1' cannot be set in the sweep"),
        ({"variants": {"a": {}, "b": {"model.ffn.hidden_dim": 32}}}, "a and b have the same settings"),
        ({"seeds": [1, 1]}, r"has the seeds \[1, 1\]; different ones"),
        ({"budget": {"tokens": 1, "flops": 1}}, "budget has tokens and flops; one of tokens, flops, seconds"),
        ({"budget": {}}, "budget has no value; one of"),
        ({"match": "size"}, "match is 'size', but it should be 'active_params', 'flops_per_token' or 'total_params'"),
        ({"config": "none.yaml"}, "There is no config file none.yaml"),
        ({"sedes": [1]}, "there is no setting sedes; did you mean seeds"),
        ({"variants": {"a": {"name": "x"}, "b": {}}}, "cannot be set in the sweep study, which names its runs"),
        ({"variants": {"a": {}, "b": {"train.steps": 9}}, "budget": {"tokens": 999}}, "study, whose budget determines it"),
        (
            {"variants": {"a": {}, "b": {"data.seq_len": 16}}},
            "a and b differ in data.seq_len, so their losses cannot be compared",
        ),
        ({"variants": {"a": {}, ";": {}}}, "a variant ';'; a label with a letter or digit"),
        ({"seeds": [0, -1]}, "seeds.1 is -1, but it should be greater than or equal to 0"),
        ({"budget": {"tokens": float("inf")}}, "budget.tokens is inf, but it should be a finite number"),
        ({"variants": {"a": {"model.ffn.hiden_dim": 4}, "b": {}}}, "Variant a: .*did you mean hidden_dim"),
        ({"variants": ["a", "b"]}, "variants is .* but it should be a section of settings"),
        ({"contestants": {"a": {}, "b": {}}}, "contestants has been renamed; its name is now variants"),
    ],
)
def test_invalid_sweeps_are_refused(workplace: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MoelmError, match=sentence):
        plan(workplace, **settings)
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("path", MATCHED, ids=lambda path: path.stem)
def test_variants_of_the_shipped_sweeps_match(path: Path) -> None:
    sweep = load_sweep(path).model_copy(update={"tokens_per_param": None})  # it needs the number of tokens of the data
    assert sweep.match is not None
    first: dict[str | None, int] = {}
    for variant in plan_sweep(path, sweep, ["model.vocab_size=2048"]):
        size = model_size(variant.config, sweep.match)
        assert size == pytest.approx(first.setdefault(variant.size, size), rel=0.01)


def test_the_sizes_of_the_shipped_ladder_have_equal_heads_and_proportions() -> None:
    path = SWEEPS / "ladder.yaml"
    sweep = load_sweep(path).model_copy(update={"tokens_per_param": None})
    variants = plan_sweep(path, sweep, ["model.vocab_size=2048"])
    dense = [variant.config.model for variant in variants if variant.variant == "dense"]
    assert {(model.size_per_head, model.ffn.hidden_dim / model.dim) for model in dense} == {(16, 4.0)}
    assert {(variant.config.model.parametrization, variant.config.model.base_dim) for variant in variants} == {("mup", 64)}
    assert max(model.dim for model in dense) > max(each.config.model.dim for each in variants if each.variant != "dense")


def test_the_dense_widths_have_the_demos_proportions() -> None:
    """Heads of 32, or two of 24, hidden units of four times the width, and initial weights near 0.8 / sqrt(width)."""
    path = SWEEPS / "dense-width.yaml"
    sweep = load_sweep(path)
    assert sweep.budget is not None
    assert sweep.budget.seconds is not None
    sweep = sweep.model_copy(update={"budget": None})  # measuring takes minutes
    models = [variant.config.model for variant in plan_sweep(path, sweep, ["model.vocab_size=2048"])]
    assert sorted(model.dim for model in models) == [48, 64, 96, 128, 192]
    for model in models:
        assert model.size_per_head == (24 if model.dim == 48 else 32)
        assert model.ffn.hidden_dim == 4 * model.dim
        assert model.init_std == pytest.approx(0.8 / model.dim**0.5, rel=0.02)


def test_branches_end_at_parts_of_the_steps(workplace: Path) -> None:
    overrides = ("train.steps=40", "optim.schedule=wsd", "optim.warmup_steps=5")
    dense, moe = plan(workplace, *overrides, seeds=[3, 5], branches=[0.75, 0.5])
    assert dense.branch_steps == moe.branch_steps == (20, 30)
    assert moe.branch(5, 30).path.name == "study-moe-5-30"
    arguments = moe.train_arguments(5, 30)
    assert arguments[-3:] == ["train.steps=30", "--branch-from", "runs/study-moe-5"]
    assert "name=study-moe-5-30" in arguments
    assert moe.as_dict()["branches"] == ["study-moe-3-20", "study-moe-3-30", "study-moe-5-20", "study-moe-5-30"]


@pytest.mark.parametrize(
    ("overrides", "branches", "message"),
    [
        (
            ["optim.schedule=cosine"],
            [0.5],
            r"decays from the start \(optim.schedule: cosine\); wsd or constant is expected",
        ),
        (["optim.schedule=wsd"], [0.1, 0.5], r"end at the steps 4, 20; steps after the warmup \(5\)"),
        (["optim.schedule=wsd"], [0.999], r"end at the steps 40; steps after the warmup \(5\) and before the end \(40\)"),
    ],
)
def test_impossible_branches_are_refused(
    workplace: Path, overrides: list[str], branches: list[float], message: str
) -> None:
    with pytest.raises(MoelmError, match=message):
        plan(workplace, "train.steps=40", "optim.warmup_steps=5", *overrides, branches=branches)
