"""What starts moelm on clusters, as far as it can be run here: every shell line is, on two nodes of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.launching import ROOT, STEADY, metrics

SCRIPTS = ROOT / "scripts"
PYTORCHJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"nprocPerNode", "runPolicy", "elasticPolicy", "pytorchReplicaSpecs"},
    "spec.elasticPolicy": {"rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "minReplicas", "maxReplicas", "maxRestarts"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
}
"""Keys that the operator's schema knows, by section."""
SKYPILOT = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"},
    "resources": {"infra", "accelerators", "use_spot", "network_tier", "job_recovery"},
    "file_mounts./work": {"name", "source", "store", "mode"},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def section(tree: Any, path: str) -> dict[str, Any]:
    for part in filter(None, path.split(".")):
        tree = tree[part]
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize(("name", "schema"), [("kubernetes", PYTORCHJOB), ("skypilot", SKYPILOT)])
def test_manifests_have_only_keys_that_are_known(name: str, schema: dict[str, set[str]]) -> None:
    tree = yaml.safe_load((SCRIPTS / f"{name}.yaml").read_text())
    for path, known in schema.items():
        assert section(tree, path).keys() <= known, path


def test_the_manifest_says_what_the_operator_asks_for() -> None:
    tree = yaml.safe_load((SCRIPTS / "kubernetes.yaml").read_text())
    assert (tree["apiVersion"], tree["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert isinstance(tree["spec"]["nprocPerNode"], str)
    worker = tree["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"  # torchrun ends with 1 whatever the reason was
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert (ROOT / container["command"][-1]).is_file()


def test_shell_is_shell() -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    for text in ((SCRIPTS / "slurm.sbatch").read_text(), task["run"], task["setup"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(workplace: Path) -> dict[str, str]:
    """An environment in which two nodes of a Slurm are this machine twice."""
    tools = workplace / "tools"
    tools.mkdir()
    tool(tools, "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    tool(tools, "srun", '"$@" & a=$!; "$@" & b=$!; echo "$a $b" > tasks; wait $a && wait $b')
    tool(tools, "scancel", "kill -USR1 $(cat tasks)")
    tool(tools, "scontrol", '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > requeued')
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "MOELM_PORT": str(free_port()),
    }


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_goes_on(workplace: Path, cluster: dict[str, str]) -> None:
    settings = [*STEADY, "train.eval_every=1000", "parallel.ep=2"]
    script = ["bash", str(SCRIPTS / "slurm.sbatch"), "moe.yaml", *settings, "train.steps=100"]
    process = subprocess.Popen(script, cwd=workplace, env=cluster, stderr=subprocess.PIPE, text=True)
    lines = workplace / "runs/tiny-moe/metrics.jsonl"
    end = time.monotonic() + 90
    while not (lines.exists() and lines.read_text().count("\n") > 3):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    assert told.count("Stopped by SIGUSR1 and saved at step") == 1, told
    assert (workplace / "requeued").read_text().split() == ["requeue", "7"]
    done = subprocess.run(
        script, cwd=workplace, env={**cluster, "SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Resuming runs/tiny-moe from step" in done.stderr
    assert [line["step"] for line in metrics(workplace / "runs/tiny-moe")] == list(range(1, 101))


@pytest.mark.slow
def test_the_skypilot_task_runs_on_two_nodes(workplace: Path, cluster: dict[str, str]) -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    script = task["run"].replace("/work", str(workplace)).replace("29500", cluster["MOELM_PORT"])
    nodes = [
        subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **cluster,
                "CONFIG": "moe.yaml",
                "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
                "SKYPILOT_NODE_RANK": str(rank),
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            },
        )
        for rank in (0, 1)
    ]
    told = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "validation loss" in told[0][0]
