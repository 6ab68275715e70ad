"""The manifests under `deploy/`: their syntax, and what each must say."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from shardkit.command.main import main

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = ("slurm.sbatch", "tpu_vm.sh")
MANIFESTS = ("jobset.yaml", "kuberay.yaml")


class Strict(yaml.SafeLoader):
    """Refuses a key that is given twice, as Kubernetes does."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: twice in {keys}"
        return super().construct_mapping(node, deep)


def read(name):
    return list(yaml.load_all((DEPLOY / name).read_bytes(), Strict))


def pods(name):
    """Finds all pod specs of a manifest, whatever they are in."""

    def walk(value):
        if isinstance(value, dict):
            if isinstance(value.get("containers"), list):
                yield value
            for each in value.values():
                yield from walk(each)
        elif isinstance(value, list):
            for each in value:
                yield from walk(each)

    return list(walk(read(name)))


def shell_texts():
    """All shell text: scripts, and commands in manifests, by a name for it."""
    for name in SCRIPTS:
        yield name, (DEPLOY / name).read_text()
    for name in MANIFESTS:
        for number, pod in enumerate(pods(name)):
            for text in pod["containers"][0].get("args", []):
                yield f"{name}[{number}]", text
    yield "kuberay.yaml entrypoint", read("kuberay.yaml")[0]["spec"]["entrypoint"]


def test_nothing_here_is_unchecked():
    assert {path.name for path in DEPLOY.iterdir()} == {*SCRIPTS, *MANIFESTS}


@pytest.mark.parametrize(("name", "text"), list(shell_texts()))
def test_shell_parses(name, text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stop_at_the_first_error(name):
    text = (DEPLOY / name).read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "\nset -euo pipefail\n" in text


def test_sbatch_reads_all_its_headers():
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    headers = [line for line in lines if line.startswith("#SBATCH")]
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    # From the first command on they are comments.
    assert headers == [line for line in lines[:end] if "SBATCH" in line]
    options = {}
    for header in headers:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", header)
        assert match, header
        options[match[1]] = match[2]
    assert len(options) == len(headers)
    assert int(options["nodes"]) >= 2
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", options["time"])
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])
    assert {"no-kill", "requeue", "gpus-per-node"} <= options.keys()
    assert options["open-mode"] == "append"


def test_the_job_set_is_one():
    job_set, policy = read("jobset.yaml")
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["kind"] == "JobSet"
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    jobs = {job["name"]: job["template"]["spec"] for job in spec["replicatedJobs"]}
    assert jobs.keys() == {"head", "host"}
    assert spec["successPolicy"]["targetReplicatedJobs"] == ["head"]
    assert spec["failurePolicy"] == {"maxRestarts": 0}
    assert spec["network"]["enableDNSHostnames"] is True
    for job in jobs.values():
        assert job["parallelism"] == job["completions"]
        assert job["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    # A pod failure policy is refused with any other.
    assert jobs["head"]["template"]["spec"]["restartPolicy"] == "Never"
    (rule, _) = jobs["head"]["podFailurePolicy"]["rules"]
    (container,) = jobs["head"]["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2, 3]
    (host,) = jobs["host"]["template"]["spec"]["containers"]
    assert f"{name}-head-0-0.{name}:6379" in host["args"][0]
    terms = jobs["host"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"]["matchLabels"] == {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-name": "host",
    }
    check_size(container["args"][0], jobs["host"]["parallelism"], host)
    check_policy(policy)


def test_the_ray_job_is_one():
    job, policy = read("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"] is True
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for params in (head["rayStartParams"], group["rayStartParams"]):
        assert all(isinstance(value, str) for value in params.values())
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["rayStartParams"]["num-gpus"] == str(
        container["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert "\n" not in spec["entrypoint"]
    check_size(spec["entrypoint"], group["replicas"], container)
    check_policy(policy, num_sources=2)


def check_size(command, num_hosts, container):
    """A command asks for what the hosts have."""
    flags = dict(re.findall(r"--(processes|devices|min-devices) (\d+)", command))
    num_devices = num_hosts * container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(flags["processes"]) == num_hosts
    assert int(flags["devices"]) == num_devices
    assert 0 < int(flags["min-devices"]) <= num_devices


def check_policy(policy, num_sources=1):
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert len(policy["spec"]["ingress"]) == num_sources
    assert all(rule["from"] for rule in policy["spec"]["ingress"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_what_shardkit_needs(name):
    found = pods(name)
    assert len(found) == 2
    for pod in found:
        (container,) = pod["containers"]
        assert container["image"] == "REGISTRY/shardkit:TAG"
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert "runs" in mounted
    (host,) = (pod for pod in found if "affinity" in pod)
    mounts = {m["mountPath"]: m["name"] for m in host["containers"][0]["volumeMounts"]}
    (memory,) = (v for v in host["volumes"] if v["name"] == mounts["/dev/shm"])
    assert memory["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_of_a_run_has_the_label_of_its_policy(name):
    first, policy = read(name)
    wanted = policy["spec"]["podSelector"]["matchLabels"]

    def labels(value):
        if isinstance(value, dict):
            if "spec" in value and "containers" in (value["spec"] or {}):
                yield value.get("metadata", {}).get("labels", {})
            for each in value.values():
                yield from labels(each)
        elif isinstance(value, list):
            for each in value:
                yield from labels(each)

    found = list(labels(first))
    assert len(found) == 2
    assert all(wanted.items() <= each.items() for each in found)


@pytest.mark.parametrize(("name", "text"), list(shell_texts()))
def test_runs_are_launched_so_that_they_go_on(name, text):
    flat = re.sub(r"\\\n\s*", "", text)
    if "shardkit launch" not in flat:
        assert "ray start" in flat
        return
    assert "--resume" in flat
    assert "--out" in flat
    assert "--engine" in flat


def test_no_host_is_named():
    for path in [*DEPLOY.iterdir(), ROOT / "docs" / "deploy.md"]:
        text = path.read_text(encoding="utf-8")
        for image in re.findall(r"image: *(\S+)", text):
            assert image == "REGISTRY/shardkit:TAG"
        assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", text), path


def test_the_page_names_every_file_and_links_lead_somewhere():
    for name in ("deploy.md", "failures.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (ROOT / "docs" / link).exists(), link
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert all(f"deploy/{path.name}" in text for path in DEPLOY.iterdir())


def test_status_flags_that_are_documented_exist(capsys):
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    shown = capsys.readouterr().out
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for line in re.findall(r"^shardkit status.*$", text, re.MULTILINE):
        assert all(flag in shown for flag in re.findall(r"--\w+", line))
