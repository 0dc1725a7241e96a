"""Which layouts a plan looks at, and what it says of them."""

import json

import pytest

from moelm.bench.models import shape_of
from moelm.config import RunConfig, load_config
from moelm.distributed.layout import Layout
from moelm.errors import MoelmError
from moelm.hardware import DEVICES
from moelm.model import count_parameters
from moelm.plan import make_plan
from moelm.plan.memory import Setting, estimate_memory
from moelm.plan.search import LINKS, _seconds, layouts
from moelm.plan.traffic import Message, Traffic, messages
from tests.conftest import Moelm
from tests.distributed.launching import ROOT

GB = 1e9


def shaped(name: str, *settings: str) -> RunConfig:
    config = load_config(str(ROOT / f"configs/{name}.yaml"), settings)
    return config.model_copy(update={"model": shape_of(config)})


def test_layouts_are_all_products_that_the_model_allows() -> None:
    found = set(layouts(shaped("demo-moe"), 4))
    assert found == {Layout(*sizes) for sizes in [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]}
    assert all(layout.ep == 1 for layout in layouts(shaped("demo-dense"), 4))


def test_what_does_not_fit_comes_last_and_the_fastest_first() -> None:
    plan = make_plan(shaped("mixtral-8x7b"), 64, "h100")
    fits = [choice.fits for choice in plan.choices]
    assert fits == sorted(fits, reverse=True)
    assert plan.best.fits
    times = [choice.step_s for choice in plan.choices if choice.fits]
    assert times == sorted(times)
    assert not make_plan(shaped("mixtral-8x7b"), 8, "h100").best.fits


def test_shared_weights_are_divided_and_copies_are_not() -> None:
    config = shaped("mixtral-8x7b")
    parameters = 46_702_792_704

    def weights(*layout: int) -> float:
        return estimate_memory(config, Setting(Layout(*layout), "full", 1, True)).weights / GB

    assert weights(1, 1, 1) == pytest.approx(4 * parameters / GB, rel=1e-6)
    assert weights(1, 64, 1) == pytest.approx(4 * parameters / 64 / GB, rel=1e-6)
    assert weights(8, 8, 1) == pytest.approx(4 * parameters / 8 / GB, rel=1e-6)
    # Experts dealt out over eight, the trunk whole everywhere.
    trunk = parameters - 32 * 8 * 3 * 4096 * 14336
    assert weights(1, 1, 8) == pytest.approx(4 * (trunk + (parameters - trunk) / 8) / GB, rel=1e-6)


def test_messages_by_hand() -> None:
    """Two processes, one micro-batch, float32: a sum of P numbers sends 4 P bytes, a gather or scatter half of that."""
    config = shaped("demo-moe", "train.precision=float32")
    parameters, experts = 3_937_664, 4 * 8 * 3 * 128 * 256

    def sent(*layout: int) -> tuple[int, ...]:
        return tuple(Traffic.of(list(messages(config, Setting(Layout(*layout), "none", 4, False)))))

    assert sent(2, 1, 1) == (0, 0, 4 * parameters, 0)
    assert sent(1, 2, 1) == (2 * 2 * parameters, 2 * parameters, 0, 0)
    # Two ways and their gradients, in four layers, of which half stays here: 1,024 tokens, two experts each, 128 wide.
    assert sent(1, 1, 2) == (0, 0, 4 * (parameters - experts), 4 * 4 * 1024 * 2 * 128 * 4 // 2)


def test_layers_that_repeat_are_gathered_at_each_visit_and_summed_once() -> None:
    whole, looped = (shaped("demo-moe", "train.precision=float32", *words) for words in ((), ("model.unique_layers=2",)))
    plain, repeated = (
        Traffic.of(list(messages(config, Setting(Layout(1, 2, 1), "none", 4, False)))) for config in (whole, looped)
    )
    assert repeated.all_gather == plain.all_gather
    left_out = count_parameters(whole.model).total - count_parameters(looped.model).total
    assert plain.reduce_scatter - repeated.reduce_scatter == 2 * left_out


def test_groups_inside_a_machine_have_its_links_and_others_the_network() -> None:
    h100 = DEVICES["h100"]

    def bandwidth(size: int, stride: int) -> float:
        return 1e12 / _seconds(Message("all_gather", 1e12, size, stride), h100) / LINKS / GB

    assert [bandwidth(*group) for group in ((8, 1), (2, 4))] == pytest.approx([450, 450])
    assert [bandwidth(*group) for group in ((16, 1), (2, 8), (4, 4))] == pytest.approx([50, 50, 50])


def test_the_order_of_layouts_is_that_of_published_runs() -> None:
    """Mixtral 8x22B on 128 H100s: FSDP reached 4.3%, FSDP with experts dealt out 23.4% (arXiv 2504.14960, table 1)."""
    shape = ("dim=6144", "num_layers=56", "num_heads=48", "ffn.hidden_dim=16384", "ffn.balance.scope=micro")
    settings = [f"model.{word}" for word in shape]
    plan = make_plan(shaped("mixtral-8x7b", *settings, "train.batch_tokens=1048576"), 128, "h100")
    mfu = {choice.setting.layout: choice.mfu for choice in plan.choices}
    planned, published = (mfu[Layout(1, 128, 1)], mfu[Layout(1, 16, 8)]), (0.043, 0.234)
    assert planned[1] / planned[0] == pytest.approx(published[1] / published[0], rel=0.1)
    # Hopeful by the same factor for both: nothing waits for the slowest expert in a plan.
    assert all(1 < plan / real < 2 for plan, real in zip(planned, published, strict=True))


def test_keeping_less_is_smaller_and_slower() -> None:
    config = shaped("small-moe")
    kept = [make_plan(config, 8, "h100").best]
    for what in ("selective", "full"):
        kept.append(make_plan(shaped("small-moe", f"parallel.activation_checkpointing={what}"), 8, "h100").best)
    assert [choice.setting.checkpointing for choice in kept] == ["none", "selective", "full"]
    assert kept[0].memory.activations > kept[1].memory.activations > kept[2].memory.activations
    assert kept[0].step_s < kept[1].step_s < kept[2].step_s


@pytest.mark.parametrize(
    ("gpus", "device", "told"), [(3, "h100", "3 processes cannot have equal parts"), (1, "tpu", "no device 'tpu'")]
)
def test_what_cannot_be_planned_is_a_sentence(gpus: int, device: str, told: str) -> None:
    with pytest.raises(MoelmError, match=told):
        make_plan(shaped("demo-moe"), gpus, device)


def test_the_command_prints_a_table_and_json(moelm: Moelm) -> None:
    words = ["plan", str(ROOT / "configs/mixtral-8x7b.yaml"), "--gpus", "64"]
    table = moelm(*words)
    assert table.returncode == 0
    for told in ("46,702,792,704", "best", "all-to-all", "optimizer", "Assumed:"):
        assert told in table.stdout
    plan = json.loads(moelm(*words, "--json").stdout)
    assert plan["parameters_active"] == 12_879_925_248
    assert plan["best"] == plan["layouts"][0]
    assert plan["best"]["dp_replicate"] * plan["best"]["dp_shard"] * plan["best"]["ep"] == 64
    assert plan["best"]["memory_bytes"]["total"] < 80e9
    assert plan["assumptions"]
