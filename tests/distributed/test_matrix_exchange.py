"""Each matrix is orthogonalized by one process, and the work is balanced."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed.muon_products import main as count_products
from tests.distributed.test_trajectory import LAYOUTS
from tests.processes import run_ranks

MODEL = [
    "optim.kind=muon",
    "model.num_heads=4",
    "model.head_dim=4",
    "model.num_layers=3",
    "model.ffn={kind: moe, hidden_dim: 48, num_experts: 4, top_k: 2}",
]
UNEVEN = "parallel.dp_shard=4|model.ffn.num_experts=6"


def cost(counts: dict[str, int]) -> int:
    """Relative cost of products of matrices, by shape."""
    sizes = {shape: tuple(map(int, shape.split("x"))) for shape in counts}
    return sum(count * sizes[shape][0] ** 2 * sizes[shape][1] for shape, count in counts.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_no_matrix_is_orthogonalized_twice(workplace: Path, processes: int) -> None:
    layouts = [*LAYOUTS[processes].values(), *([UNEVEN] if processes == 4 else [])]
    arguments = ["|".join(["seed=0", *MODEL, *filter(None, [layout])]) for layout in dict.fromkeys(layouts)]
    done = run_ranks(count_products, ["muon_products", "moe.yaml", *arguments], workplace, processes)
    assert done.returncode == 0, done.stderr
    single = run_ranks(count_products, ["muon_products", "moe.yaml", "|".join(MODEL)], workplace, 1)
    (expected,) = json.loads(single.stdout)["|".join(MODEL)]
    for layout, by_rank in json.loads(done.stdout).items():
        experts = 6 if "num_experts=6" in layout else 4
        total: Counter[str] = sum(map(Counter, by_rank), Counter())
        assert total == {**expected, "16x48": 3 * 3 * experts}, layout
        largest, mean = max(map(cost, by_rank)), sum(map(cost, by_rank)) / processes
        print(layout, by_rank, f"{largest / mean:.2f}")
        assert largest < 1.1 * mean, layout
