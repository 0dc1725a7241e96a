"""Sweeps with sizes: which runs there are, and how large, how long and with which batch."""

from pathlib import Path
from typing import Any

import pytest

from moelm.errors import MoelmError
from moelm.model.flops import count_parameters
from moelm.sweep.match import model_size
from moelm.sweep.sizes import active_without_embedding
from tests.sweep.test_plan import plan

SIZES: dict[str, Any] = {
    "w16": {"model.dim": 16, "model.ffn.hidden_dim": 64},
    "w32": {"model.dim": 32, "model.ffn.hidden_dim": 128, "seeds": [3]},
    "w48": {"model.dim": 48, "model.ffn.hidden_dim": 192, "seeds": [3], "variants": ["dense"]},
}
LADDER: dict[str, Any] = {"sizes": SIZES, "seeds": [3, 5], "match": "flops_per_token", "tokens_per_param": 20}


def test_every_variant_is_trained_in_every_size_that_it_has(workplace: Path) -> None:
    variants = plan(workplace, **LADDER)
    assert [(each.label, each.variant, each.size) for each in variants] == [
        ("dense-w16", "dense", "w16"),
        ("moe-w16", "moe", "w16"),
        ("dense-w32", "dense", "w32"),
        ("moe-w32", "moe", "w32"),
        ("dense-w48", "dense", "w48"),
    ]
    assert [run.path.name for run in variants[0].runs.values()] == ["study-dense-w16-3", "study-dense-w16-5"]
    assert [run.path.name for run in variants[3].runs.values()] == ["study-moe-w32-3"]
    assert [each.config.model.dim for each in variants] == [16, 16, 32, 32, 48]


def test_variants_match_the_first_in_their_own_size(workplace: Path) -> None:
    dense_16, moe_16, dense_32, moe_32, _ = plan(workplace, **LADDER)
    for dense, moe in ((dense_16, moe_16), (dense_32, moe_32)):
        assert model_size(moe.config, "flops_per_token") == pytest.approx(dense.flops_per_token, rel=0.01)
    assert moe_16.config.model.ffn.hidden_dim < moe_32.config.model.ffn.hidden_dim


def test_a_match_ratio_makes_a_variant_smaller(workplace: Path) -> None:
    variants = plan(workplace, **LADDER, match_ratio={"moe": 0.75})
    assert variants[1].flops_per_token == pytest.approx(0.75 * variants[0].flops_per_token, rel=0.01)


def test_parameters_determine_tokens_and_tokens_the_batch(workplace: Path) -> None:
    """Batches grow with the tokens to the power 0.571, in whole rows, and all variants of a size have the same."""
    variants = plan(workplace, **LADDER)
    rows = variants[0].config.data.seq_len
    for variant in variants:
        first = next(each for each in variants if each.size == variant.size)
        tokens = 20 * active_without_embedding(first.config)
        train = variant.config.train
        assert train.batch_tokens % rows == 0
        assert train.steps * train.batch_tokens == pytest.approx(tokens, abs=train.batch_tokens / 2)
        assert train == first.config.train
    small, large = variants[0].config, variants[4].config
    ratio = (large.train.steps * large.train.batch_tokens) / (small.train.steps * small.train.batch_tokens)
    assert large.train.batch_tokens / small.train.batch_tokens == pytest.approx(ratio**0.571, rel=0.15)


def test_what_a_size_sets_is_kept(workplace: Path) -> None:
    sizes = {"w16": {**SIZES["w16"], "train.batch_tokens": 320, "optim.warmup_steps": 7}, "w32": SIZES["w32"]}
    config = plan(workplace, **{**LADDER, "sizes": sizes})[0].config
    assert (config.train.batch_tokens, config.optim.warmup_steps) == (320, 7)


def test_parameters_of_embedding_and_head_are_not_counted(workplace: Path) -> None:
    config = plan(workplace, **LADDER)[0].config
    count, dim = count_parameters(config.model), config.model.dim
    matrices = 1 if config.model.tie_embeddings else 2
    assert active_without_embedding(config) == count.active - matrices * dim * (config.model.vocab_size or 0)


def test_more_tokens_than_the_data_has_are_warned_of(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(workplace, **{**LADDER, "tokens_per_param": 2000})
    assert "times its" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sizes": {}}, "tokens_per_param is set, but there are no sizes"),
        ({"budget": {"tokens": 1e6}}, "budget and tokens_per_param both determine"),
        ({"match": None, "match_ratio": {"moe": 0.5}}, "match_ratio is set, but there is no match"),
        (
            {"match_ratio": {"dense": 0.5}},
            "match_ratio names .dense.; one of the variants after the first",
        ),
        ({"match_ratio": {"moe": 0}}, "match_ratio.moe is 0, but it should be greater than 0"),
        ({"sizes": {"w_1": {}}}, "sizes has the label 'w_1'; letters, digits, dots and hyphens"),
        ({"sizes": {"w1": {"variants": ["other"]}}}, "sizes.w1.variants names 'other'; some of dense, moe are expected"),
        ({"sizes": {"w1": {"variants": ["moe"]}}}, "sizes.w1.variants lacks the first variant, dense"),
        ({"sizes": {"w1": {"seeds": [1, 1]}, "w2": {}}}, r"has the seeds \[1, 1\]; different ones"),
        ({"sizes": {"w1": {"seeds": []}}}, "sizes.w1.seeds is \\[\\], but it should be a list with something in it"),
        (
            {"sizes": {"w1": {"train.steps": 4}, "w2": {}}},
            "cannot be set in the sweep study, whose tokens_per_param determines it",
        ),
        ({"sizes": {"a": {}, "b": {}}}, "The variants dense-a and dense-b have the same settings"),
        (
            {"tokens_per_param": 1e-9},
            "tokens_per_param is 1e-09, which gives study-dense-w16 0 tokens, fewer than one",
        ),
        ({"sizes": {"w1": 3}}, "sizes.w1 is 3, but it should be a section of settings"),
        ({"sizes": {"w1": {"model.dmi": 3}, "w2": {}}}, "Variant dense-w1: dense.yaml: there is no setting model.dmi"),
    ],
)
def test_invalid_sizes_are_refused(workplace: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MoelmError, match=sentence):
        plan(workplace, **{**LADDER, **settings})


def test_without_mup_the_rate_falls_with_parameters_and_grows_with_tokens(workplace: Path) -> None:
    variants = plan(workplace, **LADDER)
    small, large = variants[0].config, variants[4].config
    more_parameters = active_without_embedding(large) / active_without_embedding(small)
    more_tokens = (large.train.steps * large.train.batch_tokens) / (small.train.steps * small.train.batch_tokens)
    expected = more_parameters**-0.713 * more_tokens**0.307
    assert large.optim.lr / small.optim.lr == pytest.approx(expected, rel=0.02)
    assert variants[1].config.optim.lr == small.optim.lr


def test_with_mup_all_sizes_have_the_rate_of_the_config(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mup = {"model.parametrization": "mup", "model.base_dim": 16}
    sizes = {label: {**settings, **mup} for label, settings in SIZES.items()}
    base = plan(workplace)[0].config
    assert {each.config.optim.lr for each in plan(workplace, **{**LADDER, "sizes": sizes})} == {base.optim.lr}
    assert "head_dim (8, 16, 24)" in capsys.readouterr().err


def test_a_rate_that_a_size_sets_is_kept(workplace: Path) -> None:
    sizes = {**SIZES, "w16": {**SIZES["w16"], "optim.lr": 0.5}}
    assert plan(workplace, **{**LADDER, "sizes": sizes})[0].config.optim.lr == 0.5
