"""Scripts that start training on clusters; their shell commands run here, with this machine as two nodes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import metrics_lines
from tests.distributed.launching import NO_NEAR_TIES, ROOT, wait_for_steps

SCRIPTS = ROOT / "scripts"
PYTORCHJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"nprocPerNode", "runPolicy", "elasticPolicy", "pytorchReplicaSpecs"},
    "spec.elasticPolicy": {"rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "minReplicas", "maxReplicas", "maxRestarts"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "restartPolicy", "template"},
}
"""Keys of the operator's schema, version 1, by section."""
RUNTIME = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"mlPolicy", "podGroupPolicy", "template"},
    "spec.mlPolicy": {"numNodes", "torch"},
    "spec.template.spec": {"failurePolicy", "network", "replicatedJobs", "startupPolicy", "successPolicy"},
}
TRAINJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"runtimeRef", "initializer", "trainer", "runtimePatches", "suspend", "activeDeadlineSeconds", "managedBy"},
    "spec.runtimeRef": {"name", "apiGroup", "kind"},
    "spec.trainer": {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"},
}
"""Keys of version 2."""
SKYPILOT = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"},
    "resources": {"infra", "accelerators", "use_spot", "network_tier", "job_recovery"},
    "file_mounts./work": {"name", "source", "store", "mode"},
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def section(tree: Any, path: str) -> dict[str, Any]:
    for part in filter(None, path.split(".")):
        tree = tree[part]
    assert isinstance(tree, dict)
    return tree


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((SCRIPTS / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "schemas"),
    [("kubernetes", [RUNTIME, TRAINJOB]), ("kubernetes-v1", [PYTORCHJOB]), ("skypilot", [SKYPILOT])],
)
def test_manifests_have_known_keys_only(name: str, schemas: list[dict[str, set[str]]]) -> None:
    for tree, schema in zip(documents(name), schemas, strict=True):
        for path, known in schema.items():
            assert section(tree, path).keys() <= known, path


def test_the_kubernetes_manifest_is_a_runtime_and_its_job() -> None:
    runtime, job = documents("kubernetes")
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (nodes,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert nodes["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    (container,) = nodes["template"]["spec"]["template"]["spec"]["containers"]
    assert (nodes["name"], container["name"]) == ("node", "node")  # which the trainer looks for
    check_command(job["spec"]["trainer"]["command"])


def test_the_kubernetes_manifest_for_version_1_is_a_pytorchjob() -> None:
    (tree,) = documents("kubernetes-v1")
    assert (tree["apiVersion"], tree["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert isinstance(tree["spec"]["nprocPerNode"], str)
    worker = tree["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"  # torchrun exits with 1 for any error
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    check_command(container["command"])


def check_command(command: list[str]) -> None:
    """The config is where the image has it."""
    assert command[:4] == ["torchrun", "-m", "moelm", "train"]
    assert (ROOT / Path(command[4]).relative_to("/opt/moelm")).is_file()


def test_the_image_is_built_from_files_that_exist_and_runs_unprivileged() -> None:
    build, last = ((SCRIPTS / "Dockerfile").read_text().replace("\\\n", " ")).split("\nFROM ")[1:]
    copied = [line.split()[1:-1] for stage in (build, last) for line in stage.splitlines() if line.startswith("COPY ")]
    assert copied.pop(2) == ["--from=build", "/opt/venv"]
    assert all((ROOT / name).exists() for names in copied for name in names)
    installed = next(line for line in last.splitlines() if "apt-get install" in line)
    assert set(installed.split("--no-install-recommends")[1].split("&&")[0].split()) == {"gcc", "libc6-dev"}
    user = next(line.split()[1] for line in last.splitlines() if line.startswith("USER "))
    assert f"useradd --create-home --uid 1000 {user}" in last
    assert "pip install" not in last


def test_shell_scripts_have_valid_syntax() -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    for text in ((SCRIPTS / "slurm.sbatch").read_text(), task["run"], task["setup"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def write_script(folder: Path, name: str, body: str) -> None:
    """Write an executable shell script."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(workplace: Path) -> dict[str, str]:
    """An environment with the commands of Slurm, in which this machine is both of two nodes."""
    tools = workplace / "tools"
    tools.mkdir()
    write_script(tools, "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    write_script(tools, "srun", '"$@" & a=$!; "$@" & b=$!; echo "$a $b" > tasks; wait $a && wait $b')
    write_script(tools, "scancel", "kill -USR1 $(cat tasks)")
    write_script(tools, "scontrol", '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > requeued')
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "MOELM_PORT": str(free_port()),
    }


@pytest.mark.slow(seconds=20)
def test_the_slurm_script_saves_requeues_and_resumes(workplace: Path, cluster: dict[str, str]) -> None:
    overrides = [*NO_NEAR_TIES, "train.eval_every=1000", "parallel.ep=2"]
    script = ["bash", str(SCRIPTS / "slurm.sbatch"), "moe.yaml", *overrides, "train.steps=60"]
    process = subprocess.Popen(script, cwd=workplace, env=cluster, stderr=subprocess.PIPE, text=True)
    wait_for_steps(workplace, 3)
    process.send_signal(signal.SIGUSR1)
    _, message = process.communicate(timeout=60)
    assert message.count("Stopped by SIGUSR1 and saved at step") == 1, message
    assert (workplace / "requeued").read_text().split() == ["requeue", "7"]
    done = subprocess.run(
        script, cwd=workplace, env={**cluster, "SLURM_RESTART_COUNT": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Resuming runs/tiny-moe from step" in done.stderr
    assert [line["step"] for line in metrics_lines(workplace / "runs/tiny-moe")] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.exhaustive
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
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "validation loss" in outputs[0][0]
