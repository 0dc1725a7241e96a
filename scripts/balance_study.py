"""Load balance against validation loss, on the same batches: no balancing, the Switch loss, and the loss-free bias.

    python scripts/balance_study.py [KEY=VALUE]...

All variants have the sigmoid router and differ only in `balance`, as in the paper on loss-free balancing (Wang et al.
2024). MaxVio is the maximum load over the mean load, minus 1: of single batches, and of the last tenth of the run.
"""

import argparse
from pathlib import Path

from study import Variant, markdown_table, run_variants

CONFIG = Path(__file__).parents[1] / "configs/demo-moe.yaml"
BALANCE = {
    "none": "model.ffn.balance={bias: 0}",
    "aux": "model.ffn.balance={aux: 0.01, bias: 0}",
    "bias": "model.ffn.balance={bias: 0.001}",
}


def table_row(variant: Variant) -> list[str]:
    """Label, validation loss and MaxVio."""
    load = variant.load()
    overall = float((load.max(axis=1) * load.shape[1]).mean()) - 1
    batch = variant.mean("moe/load_max_over_mean") - 1
    return [variant.label, f"{variant.val_loss:.4f}", f"{batch:.3f}", f"{overall:.3f}"]


def main() -> None:
    """Train the variants, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all variants")
    shared = ["name=balance-study", "model.ffn.router.kind=sigmoid", *parser.parse_args().overrides]
    variants = run_variants(CONFIG, {label: [override] for label, override in BALANCE.items()}, shared)
    print(
        markdown_table(["balance", "val loss", "MaxVio, batch", "MaxVio, overall"], [table_row(each) for each in variants])
    )


if __name__ == "__main__":
    main()
