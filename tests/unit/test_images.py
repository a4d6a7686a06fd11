"""What is in docker/ fits the package: lock files, commands, what containers may do."""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.run as torchrun

import cce_torchrec
from cce_torchrec.train import options

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib")
requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
USER = 10001
SERVING = ["cli", "data", "demo", "object-stores", "serving"]
EXTRAS = {
    "gpu": ["gpu", "faiss-gpu", *SERVING],
    "cpu": ["cpu", *SERVING],
    "test": ["cpu", "test", *SERVING],
}
"""Of each image, as docker/lock.sh has them."""
OUTSIDE = {"cpu": {"torch"}, "test": {"torch"}, "gpu": set()}
"""What the Dockerfile installs by itself."""


def locked(name):
    """Versions of a lock file's packages: each with hashes, and nothing of where it is from."""
    text = re.sub(r"^ *#.*\n", "", (DOCKER / "locks" / f"{name}.txt").read_text(), flags=re.M)
    found = {}
    for entry in text.replace("\\\n", " ").split("\n"):
        if not entry.strip():
            continue
        package, *hashes = entry.split()
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), entry
        found.update([package.split("==")])
    return found


def dockerfile():
    return (DOCKER / "Dockerfile").read_text()


def stage(name):
    """The lines of one stage of the Dockerfile."""
    return re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", dockerfile(), re.M | re.S)[1]


@pytest.mark.parametrize("image", EXTRAS)
def test_a_lock_file_has_what_the_extras_ask_for(image):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        word for extra in EXTRAS[image] for word in project["optional-dependencies"][extra]
    ]
    found = locked(image)
    for word in wanted:
        requirement = requirements.Requirement(word)
        # An extra may name another one of the project itself.
        if requirement.name not in {*OUTSIDE[image], project["name"]}:
            name = requirement.name.replace("_", "-").lower()
            assert name in found, f"{word}: run docker/lock.sh"
            assert found[name] in requirement.specifier, f"{word}: run docker/lock.sh"


def test_the_lock_file_of_the_build_has_what_the_build_asks_for():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found = locked("build")
    for requirement in map(requirements.Requirement, wanted):
        assert found[requirement.name] in requirement.specifier


def test_the_image_that_is_tested_is_the_one_that_is_run():
    cpu, tested = locked("cpu"), locked("test")
    assert {name: tested.get(name) for name in cpu} == cpu


def test_torch_is_the_one_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {w for w in project["optional-dependencies"]["cpu"] if w.startswith("torch==")}
    assert wanted == set(re.findall(r"\btorch==\S+", dockerfile()))
    assert f"torch=={locked('gpu')['torch']}" in wanted


@pytest.mark.parametrize("image", ["cpu", "gpu", "test"])
def test_an_image_has_no_rights_and_no_entry_point(image):
    assert "ENTRYPOINT" not in dockerfile()
    lines = stage(image).splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == f"USER {USER}:{USER}"
    if image != "test":
        assert 'CMD ["cce-torchrec", "--help"]' in lines
        assert any(line.startswith("HEALTHCHECK ") for line in lines)
        assert "g++" not in stage(image)


def test_the_health_check_says_what_is_missing(monkeypatch):
    problem = runpy.run_path(str(DOCKER / "healthcheck.py"))["problem"]
    monkeypatch.setattr("cce_torchrec.kmeans.native.available", lambda: True)
    monkeypatch.setattr("cce_torchrec.lookup.native.available", lambda: True)
    assert problem() is None
    monkeypatch.setattr("cce_torchrec.lookup.native.available", lambda: False)
    assert problem() == "no compiled kernels: lookup"

    # What the package does on first use, as on a machine without a driver.
    reason = "fbgemm-gpu, the CUDA build, needs NVIDIA's driver"
    fails = mock.Mock(side_effect=ImportError(reason))
    monkeypatch.setattr("cce_torchrec.__getattr__", fails)
    monkeypatch.delitem(cce_torchrec.__dict__, "CCEEmbeddingBagConfig", raising=False)
    assert problem() == reason


def check_command(words):
    """A command of torchrun with the training program, which can go on after a restart."""
    assert words[0] == "torchrun"
    told = torchrun.get_args_parser().parse_args(words[1:])
    assert told.module and told.training_script == "cce_torchrec.train"
    args = options.parse(told.training_script_args)
    assert args.resume and args.checkpoint_every > 0
    assert args.out.startswith("/runs/")
    return told


def compose():
    """The file, with the variables' own values put in."""
    text = (DOCKER / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


@pytest.mark.parametrize("service", ["job", "node-0", "node-1"])
def test_a_service_of_compose_trains(service):
    content = compose()
    found = content["services"][service]
    told = check_command(shlex.split(found["command"]))
    assert told.max_restarts and found["restart"].startswith("on-failure")
    assert "privileged" not in found and found["cap_drop"] == ["ALL"]
    assert {volume.split(":")[0] for volume in found["volumes"]} == set(content["volumes"])
    if service == "job":
        assert told.nproc_per_node == "2"
    else:
        assert told.nnodes == "2" and told.rdzv_endpoint == "node-0:29500"
        assert found["hostname"] == service


def pod(manifest):
    """The template of a job's pods."""
    spec = manifest["spec"]
    if manifest["kind"] == "PyTorchJob":
        spec = spec["pytorchReplicaSpecs"]["Worker"]
    return spec["template"]["spec"]


def documents(name):
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / name).read_text()))


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "torchrun.yaml"])
def test_a_manifest_trains_without_rights(name):
    job = documents(name)[-1]
    template = pod(job)
    (container,) = template["containers"]
    told = check_command(container["command"])
    assert template["securityContext"]["runAsUser"] == USER
    assert template["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    claims = {c["metadata"]["name"]: c["spec"] for c in documents("storage.yaml")}
    volumes = {v["name"]: v for v in template["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    of_runs = volumes["runs"]["persistentVolumeClaim"]["claimName"]
    assert claims[of_runs]["accessModes"] == ["ReadWriteMany"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if job["kind"] == "PyTorchJob":
        assert job["spec"]["nprocPerNode"] == gpus and container["name"] == "pytorch"
    else:
        assert told.nproc_per_node == gpus and told.rdzv_backend == "c10d"


def test_the_pods_of_a_job_meet_at_the_first():
    service, job = documents("torchrun.yaml")
    told = check_command(pod(job)["containers"][0]["command"])
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "job-name": name
    }
    assert pod(job)["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert told.rdzv_endpoint == f"{name}-0.{pod(job)['subdomain']}:{port}"
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == int(told.nnodes)
    assert spec["completionMode"] == "Indexed"  # the names of pods have their numbers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "gpu"], "it is cpu or test"),
        (["--wrong"], "--target cpu|test"),
    ],
)
def test_the_script_says_what_is_wrong(arguments, says):
    script = DOCKER / "build_without_registry.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode and says in done.stderr.lower()


def test_scripts_can_be_started():
    for name in ("lock.sh", "build_without_registry.sh"):
        assert os.access(DOCKER / name, os.X_OK)
        subprocess.run(["bash", "-n", DOCKER / name], check=True)
