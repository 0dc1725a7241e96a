#!/usr/bin/env bash
# Trains a dense model and a mixture of experts on the same batches, and compares them at equal tokens, FLOPs and seconds.
# Arguments are overrides for all runs: scripts/demo.sh train.steps=100
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${BIN:-.venv/bin}"
moelm="$bin/moelm"
started=$SECONDS
# On several CPUs the two runs train side by side, each with half of them: their operations are too short to be divided among
# all. On a GPU, which is not divided, and on one CPU, they train one after another.
cpus=$("$bin/python" -c 'import torch; from moelm.distributed.launcher import count_cpus as count
print(1 if torch.cuda.is_available() else count())')
if [ "$cpus" -gt 1 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus / 2))}"; fi

pids=""
train() { # in the background; its output is not a terminal, so that progress is printed as lines
    "$moelm" train "$@" > >(trap "" INT; exec cat >&2) 2>&1 &
    pids="$pids $!"
}
wait_for_all() {
    for pid in $pids; do wait "$pid"; done
    pids=""
}
trap 'kill $pids 2>/dev/null || :; wait' EXIT # a run that is stopped saves a checkpoint

"$moelm" prepare configs/demo-moe.yaml "$@"
train configs/demo-dense.yaml "$@"
if [ "$cpus" -eq 1 ]; then wait_for_all; fi
train configs/demo-moe.yaml "$@"
wait_for_all
# A shorter run of the mixture, so that its learning rate has decayed wherever it is compared at equal seconds.
get_steps='import json, sys; print(json.load(sys.stdin)["train"]["steps"])'
steps=$("$moelm" config configs/demo-moe.yaml "$@" --json | "$bin/python" -c "$get_steps")
train configs/demo-moe.yaml "$@" name=demo-moe-short "train.steps=$((steps * 60 / 100))" --branch-from demo-moe
wait_for_all
for name in dense moe; do
    echo
    "$moelm" sample "demo-$name" --prompt "def " --max-new-tokens 80 --temperature 0.7
done
echo
# The variation between seeds is that of ten seeds of the same runs (configs/sweeps/demo.yaml); one seed cannot show it.
seed_std=()
if [ $# -eq 0 ]; then seed_std=(--seed-std docs/studies/demo.json); fi
"$moelm" compare demo-dense demo-moe demo-moe-short --group ${seed_std[@]+"${seed_std[@]}"} --out reports/demo
echo "The demo took $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s."
