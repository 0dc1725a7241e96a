#!/usr/bin/env bash
# Trains a dense model and a mixture of experts on the same batches, and compares them at equal tokens, FLOPs and seconds.
# Arguments are overrides for all runs: scripts/demo.sh train.steps=100
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${BIN:-.venv/bin}"
moelm="$bin/moelm"
started=$SECONDS
"$moelm" prepare configs/demo-moe.yaml "$@"
for name in dense moe; do
    "$moelm" train "configs/demo-$name.yaml" "$@"
done
# Shorter runs of the mixture, so that its learning rate has decayed wherever it is compared at equal seconds.
get_steps='import json, sys; print(json.load(sys.stdin)["train"]["steps"])'
steps=$("$moelm" config configs/demo-moe.yaml "$@" --json | "$bin/python" -c "$get_steps")
for percent in 50 80; do
    "$moelm" train configs/demo-moe.yaml "$@" "name=demo-moe-$percent" "train.steps=$((steps * percent / 100))" \
        --branch-from demo-moe
done
for name in dense moe; do
    echo
    "$moelm" eval "demo-$name"
    "$moelm" sample "demo-$name" --prompt "def " --max-new-tokens 80 --temperature 0.7
done
echo
"$moelm" compare demo-dense demo-moe demo-moe-50 demo-moe-80 --group --out reports/demo
echo "The demo took $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s."
