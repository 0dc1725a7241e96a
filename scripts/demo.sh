#!/usr/bin/env bash
# Trains a dense model and a mixture of experts on the same batches, and compares them.
# Arguments are overrides for both runs: scripts/demo.sh train.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
moelm="${BIN:-.venv/bin}/moelm"
started=$SECONDS
"$moelm" prepare configs/demo-moe.yaml "$@"
for name in dense moe; do
    "$moelm" train "configs/demo-$name.yaml" "$@"
done
for name in dense moe; do
    echo
    "$moelm" eval "demo-$name"
    "$moelm" sample "demo-$name" --prompt "def " --max-new-tokens 80 --temperature 0.7
done
echo
"$moelm" compare demo-dense demo-moe --out reports/demo
echo "The demo took $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s."
