"""The files in `launch/`: shell scripts by shellcheck, manifests by the schemas of Kubernetes."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

from mmsr1_jax.config.errors import UserError
from tests.programs import ROOT

LAUNCH = ROOT / "launch"
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
)
JOBSETS = ["jobset_tpu.yaml", "jobset_gpu.yaml"]


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shell_scripts():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 7
    done = subprocess.run([str(SHELLCHECK), *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def job(name: str) -> dict:
    """Return the template of the only job of a JobSet."""
    jobset = yaml.safe_load((LAUNCH / "gke" / name).read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]


@pytest.mark.parametrize("name", JOBSETS)
def test_jobs_of_kubernetes(name):
    """The template of a JobSet is that of a Job, a kind whose schema Kubernetes publishes."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mmsr1"}, **job(name)}
    kubernetes_validate.validate(body, "1.32", strict=True)
    body["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mount"] = "/runs"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(body, "1.32", strict=True)


@pytest.mark.parametrize("name", JOBSETS)
def test_jobs_agree_with_the_commands(name):
    spec = job(name)["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [UserError.exit_code]
    assert environment["MMSR1_REPORT_STOPPED"]
    if name == "jobset_gpu.yaml":
        assert environment["MMSR1_NUM_PROCESSES"] == str(spec["completions"])
        assert environment["MMSR1_COORDINATOR"] == "mmsr1-workers-0-0.mmsr1:8476"


def test_the_task_of_skypilot():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [os.EX_TEMPFAIL]
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)


def test_the_image_has_all_that_the_package_is_made_of():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    assert copied >= {"pyproject.toml", "setup.py", "requirements.txt", "mmsr1_jax", "configs"}
