"""What infra/ hands to Docker, Kubernetes, Ray's launcher and Grafana: schemas, then tables of rules.

Kubernetes documents are held against the API server's own schemas, RayCluster and RayJob against the fields of
ray.io/v1 in KubeRay 1.7.0. A row says where, what must stand there, and why: who may run as what, who reaches whom,
where secrets stand.
"""

from __future__ import annotations

import configparser
import copy
import fnmatch
import itertools
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import dircluster
from dircluster import cli

ROOT = Path(__file__).parents[3]
INFRA, KUBERAY = ROOT / "infra", ROOT / "infra" / "kuberay"
IMAGE = f"registry.example.org/dircluster:{dircluster.__version__}"
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
SECRETIVE = re.compile(r"key|secret|password|passwd|token|credential", re.IGNORECASE)
RAY_FIELDS = {  # of ray.io/v1, without those that need a feature gate
    "spec": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec"
    " headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs",
    "headGroupSpec": "enableIngress headService ingressOptions labels rayStartParams resources serviceType template",
    "workerGroupSpecs": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams"
    " replicas resources template",
    "autoscalerOptions": "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext"
    " upscalingMode version volumeMounts",
    "authOptions": "mode secretName",
    "job": "activeDeadlineSeconds backoffLimit clusterSelector entrypoint entrypointNumCpus entrypointNumGpus"
    " entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML"
    " shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
}


class NoDuplicates(yaml.SafeLoader):
    """YAML whose mappings name every key once: PyYAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice {node.start_mark}"
        return super().construct_mapping(node, deep)


def load(file: Path) -> list[Any]:
    return [document for document in yaml.load_all(file.read_text(), NoDuplicates) if document is not None]


def title(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


EXAMPLE = load(KUBERAY / "secrets.example.yaml")
DEPLOYED = [d for file in sorted(KUBERAY.glob("*.yaml")) if "example" not in file.name for d in load(file)]
KINDS: dict[str, dict[str, Any]] = {}
for each in DEPLOYED:
    KINDS.setdefault(each["kind"], {})[each["metadata"]["name"]] = each
SECRETS = {secret["metadata"]["name"]: secret["stringData"] for secret in EXAMPLE}
CONFIGS = {name: document["data"] for name, document in KINDS["ConfigMap"].items()}
JOBS = {title(document): document["spec"] for document in KINDS["RayJob"].values()}
CLUSTERS = {title(document): document["spec"] for document in KINDS["RayCluster"].values()}
CLUSTERS |= {where: job["rayClusterSpec"] for where, job in JOBS.items()}


def pods() -> dict[str, dict[str, Any]]:
    """The pods that documents make, as specs with ``labels``; beside the head stands the operator's autoscaler."""
    made = {}
    for document in (*KINDS["Deployment"].values(), *KINDS["StatefulSet"].values()):
        template = copy.deepcopy(document["spec"]["template"])
        for claim in document["spec"].get("volumeClaimTemplates", []):
            template["spec"]["volumes"].append({"name": claim["metadata"]["name"], "emptyDir": {}})
        made[document["metadata"]["name"]] = template
    for where, cluster in CLUSTERS.items():
        for node, group in [("head", cluster["headGroupSpec"]), *(("worker", g) for g in cluster["workerGroupSpecs"])]:
            made[f"{where} {node}"] = template = copy.deepcopy(group["template"])
            template["metadata"]["labels"] |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": node}
            if node == "head" and cluster["enableInTreeAutoscaling"]:
                own = {k: v for k, v in cluster["autoscalerOptions"].items() if k != "idleTimeoutSeconds"}
                template["spec"]["containers"].append({"name": "autoscaler", "image": IMAGE, **own})
    made |= {f"{where} submitter": copy.deepcopy(job["submitterPodTemplate"]) for where, job in JOBS.items()}
    return {where: {**template["spec"], "labels": template["metadata"]["labels"]} for where, template in made.items()}


PODS = pods()
BOXES: dict[str, dict[str, Any]] = {}
"""Containers, with what their pods say of security, and with the values of their environment by name."""
for where, pod in PODS.items():
    for box in pod["containers"]:
        values = {v["name"]: v.get("value", v.get("valueFrom")) for v in box.get("env", [])}
        may = {**pod["securityContext"], **box["securityContext"]}
        BOXES[f"{where} {box['name']}"] = {**box, "securityContext": may, "env": values, "pod": pod}


def launcher() -> Any:
    """aws/cluster.yaml as Ray's launcher understands it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(INFRA / "aws" / "cluster.yaml")[0])
    validate_config(prepared)
    return prepared


EC2 = launcher()
NODES = EC2["available_node_types"]
WORDS = [w for option in EC2["docker"]["run_options"] + EC2["docker"]["head_run_options"] for w in option.split()]
MLFLOW = dict(word.split("=", 1) for word in next(b for b in BOXES.values() if b["name"] == "mlflow")["args"])
INI = {}
for name in ("basic_auth.ini", "pg_service.conf"):
    INI[name] = configparser.ConfigParser()
    INI[name].read_string(SECRETS["mlflow-server"][name])
PLACES: dict[str, dict[str, Any]] = {
    "pod": PODS,
    "Ray's pod": {where: pod for where, pod in PODS.items() if "ray.io/node-type" in pod["labels"]},
    "container": BOXES,
    "container with our files": {where: box for where, box in BOXES.items() if box["name"] != "autoscaler"},
    "Ray's container": {where: box for where, box in BOXES.items() if box["name"].startswith("ray-")},
    "volume": {f"{where} {volume['name']}": volume for where, pod in PODS.items() for volume in pod["volumes"]},
    "cluster": CLUSTERS,
    "job": JOBS,
    "documents": {"all": KINDS},
    "document": {title(d): d for d in [*DEPLOYED, *EXAMPLE] if d["kind"] != "Namespace"},
    "namespace": KINDS["Namespace"],
    "account": KINDS["ServiceAccount"],
    "service": KINDS["Service"],
    "MLflow": {"server": {**MLFLOW, **INI["basic_auth.ini"]["mlflow"]}},
    "EC2": {
        "cluster.yaml": {**EC2, "env": dict(w.split("=", 1) for f, w in itertools.pairwise(WORDS) if f == "--env")}
    },
    "EC2's head": {"head": NODES[EC2["head_node_type"]]},
    "EC2's worker": {name: node for name, node in NODES.items() if name != EC2["head_node_type"]},
    "EC2's node": {name: node["node_config"] for name, node in NODES.items()},
    "EC2's disk": {
        f"{n} {i}": d for n, x in NODES.items() for i, d in enumerate(x["node_config"]["BlockDeviceMappings"])
    },
}
SOMETHING, POSITIVE = re.compile("."), range(1, 1 << 31)
RESTRICTED = "metadata labels pod-security.kubernetes.io/enforce"
RULES: list[tuple[str, str, Any, str]] = [
    ("pod", "hostNetwork", None, "its node's ports would be open to it"),
    ("pod", "hostPID", None, "it would see its node's processes"),
    ("pod", "hostIPC", None, "it would see its node's memory"),
    ("pod", "nodeName", None, "the scheduler's checks would be passed by"),
    ("volume", "hostPath", None, "it would own its node"),
    ("pod", "automountServiceAccountToken", False, "code that trains changes no cluster"),
    ("account", "automountServiceAccountToken", False, "nor does a pod that forgets to say so"),
    ("pod", "serviceAccountName", set(KINDS["ServiceAccount"]), "the default account may have rights of others"),
    ("pod", "enableServiceLinks", False, "the Service mlflow would set MLFLOW_PORT in every pod"),
    ("container", "securityContext runAsNonRoot", True, "root inside is close to root outside"),
    ("container", "securityContext runAsUser", POSITIVE, "root inside is close to root outside"),
    ("container", "securityContext runAsGroup", POSITIVE, "root's group owns system files"),
    ("container", "securityContext seccompProfile", {"type": "RuntimeDefault"}, "fewer system calls"),
    ("container", "securityContext allowPrivilegeEscalation", False, "setuid files gain nothing"),
    ("container", "securityContext privileged", None, "it would own its node"),
    ("container", "securityContext capabilities", {"drop": ["ALL"]}, "none is needed"),
    ("container with our files", "securityContext readOnlyRootFilesystem", True, "code cannot change itself"),
    ("container", "resources requests cpu", SOMETHING, "no pod starves another"),
    ("container", "resources requests memory", SOMETHING, "no pod starves another"),
    ("container", "resources limits memory", SOMETHING, "no pod starves another"),
    ("container", "image", {IMAGE, "postgres:17-bookworm"}, "what runs is what was built"),
    ("volume", "secret defaultMode", {None, 0o440}, "other users do not read secrets"),
    ("volume", "projected defaultMode", {None, 0o440}, "other users do not read tokens"),
    ("volume", "secret secretName", {None, *SECRETS}, "it stands in the example"),
    ("documents", "Secret", None, "secrets are made from files outside the repository"),
    ("documents", "Ingress", None, "nobody outside needs a service"),
    ("document", "metadata namespace", "dircluster", "the policies hold in it alone"),
    ("namespace", RESTRICTED, "restricted", "the API server refuses what these rules forget"),
    ("service", "spec type", "ClusterIP", "nobody outside needs a service"),
    ("Ray's container", "env RAY_AUTH_MODE", "token", "who reaches Ray runs code"),
    ("Ray's container", "env RAY_AUTH_TOKEN_PATH", "/run/secrets/ray/auth_token", "the token is a file"),
    ("Ray's container", "env RAY_AUTH_TOKEN", "", "empty, so that the operator does not fill it in"),
    ("cluster", "authOptions", {"mode": "token", "secretName": "ray-token"}, "the operator asks how jobs are doing"),
    ("cluster", "headGroupSpec serviceType", "ClusterIP", "who reaches the dashboard runs code"),
    ("cluster", "headGroupSpec enableIngress", None, "who reaches the dashboard runs code"),
    ("cluster", "headGroupSpec rayStartParams num-cpus", "0", "nothing trains where drivers are"),
    ("job", "rayClusterSpec", CLUSTERS["RayCluster/dircluster"], "one set of rules for both"),
    ("job", "runtimeEnvYAML", None, "it is shown to everybody"),
    ("job", "backoffLimit", POSITIVE, "a lost head costs no run"),
    ("job", "submissionMode", "K8sJobMode", "the submitter has rules of its own"),
    ("MLflow", "--app-name", "basic-auth", "runs and models belong to somebody"),
    ("MLflow", "default_permission", "NO_PERMISSIONS", "runs and models belong to somebody"),
    ("MLflow", "admin_password", "REPLACE-ME", "or MLflow makes one that everybody knows"),
    (
        "MLflow",
        "--backend-store-uri",
        INI["basic_auth.ini"]["mlflow"]["database_uri"],
        "users and runs in one database",
    ),
    ("MLflow", "--backend-store-uri", "postgresql+psycopg2:///?service=mlflow", "no password in a URI"),
    ("MLflow", "--allowed-hosts", re.compile(r"mlflow:5000,[^*]*$"), "no other name is rebound to it"),
    ("EC2", "provider type", "aws", "the rules below are for it"),
    ("EC2", "initialization_commands", [], "the launcher's defaults install another Ray"),
    ("EC2", "setup_commands", [], "the launcher's defaults install another Ray"),
    ("EC2", "head_setup_commands", [], "the launcher's defaults install another Ray"),
    ("EC2", "worker_setup_commands", [], "the launcher's defaults install another Ray"),
    ("EC2", "docker image", IMAGE, "what runs is what was built"),
    ("EC2", "env RAY_AUTH_MODE", "token", "who reaches Ray runs code"),
    ("EC2", "env RAY_JOB_STOP_WAIT_TIME_S", "60", "a stopped job commits a checkpoint"),
    ("EC2", "file_mounts /home/dircluster/.ray", "~/.ray", "the token is a file"),
    ("EC2's head", "node_config InstanceMarketOptions", None, "it stays: it holds the drivers"),
    ("EC2's head", "resources", {"CPU": 0}, "nothing trains where drivers are"),
    ("EC2's worker", "node_config InstanceMarketOptions", {"MarketType": "spot"}, "GPUs cost most"),
    ("EC2's worker", "min_workers", 0, "none while nothing runs"),
    ("EC2's worker", "max_workers", 4, "GPUs cost most"),
    ("EC2's worker", "resources GPU", 1, "the run asks for one a worker"),
    ("EC2's node", "IamInstanceProfile Name", {"dircluster-head", "dircluster-worker"}, "roles instead of keys"),
    ("EC2's node", "MetadataOptions HttpTokens", "required", "a forged request reads no credentials"),
    ("EC2's node", "SecurityGroupIds", ["sg-REPLACE"], "without one the launcher opens SSH to everybody"),
    ("EC2's disk", "Ebs Encrypted", True, "data and checkpoints at rest"),
]
NOWHERE = [  # (files, what stands in none of them, why)
    ("*", r"AKIA[0-9A-Z]{16}|-----BEGIN", "a secret"),
    ("*", r"://[^/\s\"']*:[^/\s\"']*@", "a password in a URI"),
    ("*", r"pypi|pythonhosted|index-url[= ]+http", "an index"),
    ("*", r"(?<![\w~.])/(work|Users|mnt|root/(?!\.cache/pip))", "a path of somebody's machine"),
    ("*", rf"registry\.example\.org/[\w-]+:(?!{re.escape(dircluster.__version__)})", "another version of the image"),
    ("aws/cluster.yaml", r"\b\d{12}\b", "an account number"),
    ("aws/cluster.yaml", r"(?i)aws_(secret_)?access_key", "a key: nodes have roles"),
    ("aws/cluster.yaml", r"--privileged|--user=root", "a container that owns its node"),
    ("aws/cluster.yaml", r"(?i)--env \w*(key|secret|password|token|credential)\w*=[^\s]", "a secret among processes"),
    ("Dockerfile", r"(?m)^FROM (?!python:3\.11-slim-\w+(@sha256:[0-9a-f]{64})?$)", "a base that is not pinned"),
    ("Dockerfile", r"(?m)^ADD |curl|wget|git clone|^[^#]*https?://", "a download without a hash"),
    ("Dockerfile", r"pip install (?!--require-hashes|--no-deps --no-build-isolation --no-index)", "what no lock names"),
    ("Dockerfile", r"--mount=type=secret", "a secret in a build"),
    ("Dockerfile", r"(?im)^ *(ENV |ARG )?\w*(_key|secret|password|_token|credential)\w*=", "a secret in a layer"),
]
SOMEWHERE = [  # (file, what stands in it, why)
    ("aws/cluster.yaml", r"ray start --head [^\n]*--num-cpus=0 --dashboard-host=127\.0\.0\.1", "SSH alone reaches it"),
    ("aws/cluster.yaml", r"--cap-drop ALL\n\s+- --security-opt no-new-privileges", "no privileges there either"),
    ("Dockerfile", r"useradd --uid 1000 (.|\n)*\nUSER 1000:1000\nCMD [^\n]*\n$", "what runs is not root"),
    ("Dockerfile.dockerignore", r"^#[^\n]*\n\*\n(!|\*\*/)", "no key that lies about reaches a build"),
    ("grafana/prometheus.yml", r"names: \[dircluster\]", "it lists pods of this namespace alone"),
]


def at(thing: Any, path: str) -> Any:
    """What stands at a path of keys; None where nothing does."""
    for key in path.split():
        thing = thing.get(key) if isinstance(thing, dict) else None
    return thing


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}: {rule[1]}")
def test_what_must_stand_there(rule: tuple[str, str, Any, str]) -> None:
    place, path, expected, why = rule
    assert PLACES[place]
    for where, thing in PLACES[place].items():
        found = at(thing, path)
        if isinstance(expected, re.Pattern):
            holds = found is not None and expected.match(str(found))
        else:
            holds = found in expected if isinstance(expected, set | range) else found == expected
        assert holds, f"{where}: {path} is {found!r}, must be {expected!r}: {why}"


def test_what_must_stand_nowhere_or_somewhere() -> None:
    texts = {str(f.relative_to(INFRA)): f.read_text() for f in INFRA.rglob("*") if f.is_file() and f.suffix != ".pyc"}
    for files, pattern, what in NOWHERE:
        named = fnmatch.filter(texts, files)
        assert named
        assert not [file for file in named if re.search(pattern, texts[file])], what
    for file, pattern, why in SOMEWHERE:
        assert re.search(pattern, texts[file]), (file, why)


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_documents_fit_their_schemas(version: str) -> None:
    wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "wrapped"}}
    made = [{**wrapped, "spec": {k: v for k, v in pod.items() if k != "labels"}} for pod in PODS.values()]
    for document in [*DEPLOYED, *EXAMPLE, *made]:
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(document, version, strict=True)
    made = copy.deepcopy(made)
    made[0]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made[0], version, strict=True)


def test_ray_documents_use_fields_that_the_operator_knows() -> None:
    known = {name: set(fields.split()) for name, fields in RAY_FIELDS.items()}
    assert all(job.keys() <= known["job"] for job in JOBS.values())
    for cluster in CLUSTERS.values():
        assert cluster.keys() <= known["spec"]
        for name in ("headGroupSpec", "workerGroupSpecs", "autoscalerOptions", "authOptions"):
            parts = cluster[name] if isinstance(cluster[name], list) else [cluster[name]]
            assert all(part.keys() <= known[name] for part in parts), name
        assert cluster["rayVersion"] == pins(ROOT / "requirements.lock")["ray"]
        for group in cluster["workerGroupSpecs"]:
            assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len({title(document) for document in DEPLOYED}) == len(DEPLOYED)


def test_the_autoscaler_alone_holds_a_token_and_workers_alone_a_gpu() -> None:
    for where, box in BOXES.items():
        sources = {volume["name"]: str(volume) for volume in box["pod"]["volumes"]}
        holds = any("serviceAccountToken" in sources[mount["name"]] for mount in box.get("volumeMounts", []))
        assert holds == (box["name"] == "autoscaler"), where
        assert at(box, "resources limits nvidia.com/gpu") == ("1" if box["name"] == "ray-worker" else None), where


def test_secrets_are_placeholders_in_files_that_are_mounted_and_the_environment_names_them() -> None:
    for secret, files in SECRETS.items():
        for content in files.values():
            assert set(re.findall(r"(?m)^\S*(?:key|password|token)\S*\s*=\s*(.*)$", content) or [content]) == {
                "REPLACE-ME"
            }, secret
    assert {v["secret"]["secretName"] for v in PLACES["volume"].values() if "secret" in v} == set(SECRETS)
    named = [(where, n, v, box) for where, box in BOXES.items() for n, v in box["env"].items()]
    named += [(where, n, v, {}) for where, config in CONFIGS.items() for n, v in config.items()]
    for where, name, value, box in named:
        if isinstance(value, dict):
            ((kind, origin),) = value.items()
            assert origin["key"] in (SECRETS if kind == "secretKeyRef" else CONFIGS)[origin["name"]], (where, name)
            assert kind == "configMapKeyRef" or name == "MLFLOW_FLASK_SERVER_SECRET_KEY"  # MLflow reads it nowhere else
        elif value.startswith("/run/secrets/"):
            mounted(box, value)
        else:
            assert name.endswith(("_FILE", "_PATH")) or not value or not SECRETIVE.search(name), (where, name)
    for where, box in BOXES.items():
        assert all(source["configMapRef"]["name"] in CONFIGS for source in box.get("envFrom", [])), where
        if box["name"] in ("ray-head", "ray-worker"):
            assert "mlflow_tracking_username = trainer" in mounted(box, "/home/dircluster/.mlflow/credentials")


def mounted(box: dict[str, Any], path: str) -> str:
    """The content of the Secret that a container finds, read-only, in the file ``path``."""
    folder, _, file = path.rpartition("/")
    (mount,) = (mount for mount in box["volumeMounts"] if mount["mountPath"] == folder)
    (volume,) = (volume for volume in box["pod"]["volumes"] if volume["name"] == mount["name"])
    keys = {item["path"]: item["key"] for item in volume["secret"].get("items", [])} or {file: file}
    assert mount["readOnly"] is True
    return str(SECRETS[volume["secret"]["secretName"]][keys[file]])


def test_what_belongs_together_agrees() -> None:
    for where, pod in PODS.items():
        mounts = {m["name"] for box in pod["containers"] for m in box.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in pod["volumes"]}, where
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"], where  # it reads the secrets
    for where, pod in PLACES["Ray's pod"].items():
        env = BOXES[f"{where} {pod['containers'][0]['name']}"]["env"]
        drain, asked = env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"], env.get("RAY_JOB_STOP_WAIT_TIME_S", "60")
        assert pod["terminationGracePeriodSeconds"] > int(drain) >= int(asked) == 60, where  # to commit a checkpoint
    for name, service in KINDS["Service"].items():
        (pod,) = (pod for pod in PODS.values() if service["spec"]["selector"].items() <= pod["labels"].items())
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"]), name
    assert CONFIGS["dircluster-env"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    database = INI["pg_service.conf"]["mlflow"]
    assert KINDS["Service"][database["host"]]["spec"]["ports"][0]["port"] == int(database["port"])
    postgres = BOXES["postgres postgres"]["env"]
    assert (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]) == (database["user"], database["dbname"])
    assert len({node["IamInstanceProfile"]["Name"] for node in PLACES["EC2's node"].values()}) == 2
    for job in JOBS.values():
        python, script, *words = job["entrypoint"].split()
        run, group = cli.parse(cli.TrainJob, words).run, job["rayClusterSpec"]["workerGroupSpecs"][0]
        assert (python, script, run.scaling.device) == ("python", "jobs/train.py", "gpu")
        assert str(run.scaling.workers) == f"{group['minReplicas']}:{group['maxReplicas']}"
        assert run.storage.uri == "s3://dircluster/runs" != MLFLOW["--artifacts-destination"]  # a key for each


def pins(lock: Path) -> dict[str, str]:
    """The version of each package in a lock file; every one has a hash."""
    entries = [entry for entry in re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text()) if entry.strip()]
    assert all("--hash=sha256:" in entry for entry in entries), lock
    return dict(re.findall(r"(?m)^([\w.-]+)==([\w.+]+)", lock.read_text()))


def test_the_image_holds_what_is_locked_and_copied_and_no_more() -> None:
    server = pins(INFRA / "requirements-server.lock")
    assert set(server) == {"psycopg2-binary", "flask-wtf", "wtforms"}
    for lock in (ROOT / "requirements.lock", ROOT / "tests" / "requirements.lock"):
        assert all(pins(lock).get(name, version) == version for name, version in server.items())
    text = (INFRA / "Dockerfile").read_text()
    seen = set(re.findall(r"(?m)^!(\S+)", (INFRA / "Dockerfile.dockerignore").read_text()))
    copied = {*re.findall(r"(?m)^COPY (\S+)", text), *re.findall(r"type=bind,source=([^,]+)", text)} - {"."}
    assert seen == copied | {"dircluster", "pyproject.toml", "README.md", "LICENSE"}  # these are what setuptools reads
    assert all((ROOT / name).exists() for name in seen)


PEERS: dict[str, tuple[dict[str, str], str]] = {  # labels and namespace, or an address outside
    **{where.rpartition(" ")[2]: (pod["labels"], "dircluster") for where, pod in PODS.items()},
    "operator": (OPERATOR, "kuberay-system"),
    "beside-operator": ({}, "kuberay-system"),
    "prometheus": ({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "stranger": ({"ray.io/is-ray-node": "yes", **OPERATOR}, "default"),
    "dns": ({"k8s-app": "kube-dns"}, "kube-system"),
    "bucket": ({}, "3.5.134.1"),
    "node-credentials": ({}, "169.254.169.254"),
}
REACHES = """worker>head:6379 head>worker:31000 worker>worker:40000 submitter>head:8265 operator>head:8265
    prometheus>worker:8080 prometheus>head:8080 head>mlflow:5000 worker>mlflow:5000 mlflow>postgres:5432
    worker>bucket:443 head>bucket:443 mlflow>bucket:443 head>bucket:6443 worker>dns:53 mlflow>dns:53"""
REACHES_NOT = """submitter>head:6379 submitter>worker:40000 submitter>bucket:443 submitter>mlflow:5000
    operator>head:6379 beside-operator>head:8265 stranger>head:8265 stranger>head:10001 stranger>mlflow:5000
    bucket>head:8265 prometheus>head:8265 worker>postgres:5432 mlflow>head:8265 worker>submitter:80
    postgres>bucket:443 postgres>mlflow:5000 worker>bucket:80 worker>bucket:6443 worker>node-credentials:80
    head>node-credentials:443 mlflow>node-credentials:443"""


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "matchLabels only are read here"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def admits(side: dict[str, Any], labels: dict[str, str], space: str) -> bool:
    """Whether one side of a rule names a peer."""
    outside = space[0].isdigit()
    if "ipBlock" in side:
        assert side["ipBlock"] == {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}, "the node's own credentials"
        return outside and not space.startswith("169.254.")
    spaces = side.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "dircluster"}})
    inside = selects(spaces, {"kubernetes.io/metadata.name": space})
    return not outside and inside and selects(side.get("podSelector", {}), labels)


def passes(way: str, pod: str, other: str, port: int) -> bool:
    """Whether the policies that select ``pod`` let traffic through, "egress" to or "ingress" from ``other``."""
    labels, space = PEERS[pod]
    if space != "dircluster":
        return True  # policies of this folder do not select it
    specs = [policy["spec"] for policy in KINDS["NetworkPolicy"].values()]
    rules = [
        r
        for s in specs
        if way.title() in s["policyTypes"] and selects(s["podSelector"], labels)
        for r in s.get(way, [])
    ]
    open_ = [r for r in rules if port in [p["port"] for p in r.get("ports", [{"port": port}])]]
    return any(admits(side, *PEERS[other]) for r in open_ for side in r["to" if way == "egress" else "from"])


@pytest.mark.parametrize(("rows", "expected"), [(REACHES, True), (REACHES_NOT, False)], ids=["reaches", "reaches not"])
def test_who_reaches_whom(rows: str, expected: bool) -> None:
    for row in rows.split():
        one, other, port = re.split("[>:]", row)
        found = passes("egress", one, other, int(port)) and passes("ingress", other, one, int(port))
        assert found is expected, row


def test_nothing_is_allowed_that_is_not_named_and_every_policy_selects_somebody() -> None:
    policies = {name: policy["spec"] for name, policy in KINDS["NetworkPolicy"].items()}
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies.values()
    for name, policy in policies.items():
        sides = [s for way in ("ingress", "egress") for r in policy.get(way, []) for s in r.get("from", r.get("to"))]
        selectors = [policy["podSelector"], *(s["podSelector"] for s in sides if set(s) == {"podSelector"})]
        assert all(any(selects(s, pod["labels"]) for pod in PODS.values()) for s in selectors), name


def test_the_dashboard_shows_what_runs_and_ray_export() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from dircluster.cluster.runtime.channel import GAUGES

    asked = json.dumps(json.loads((INFRA / "grafana" / "dashboard.json").read_text()))
    assert set(re.findall(r"ray_(dircluster_\w+)", asked)) == set(GAUGES)
    assert not re.search(r"(?<!ray_)\bdircluster_", asked), "Ray's prefix is missing"
    assert set(re.findall(r"ray_(node_\w+)", asked)) <= set(METRICS_GAUGES)


def test_the_readme_names_files_that_exist_and_applies_no_placeholder() -> None:
    text = (INFRA / "README.md").read_text()
    assert all((ROOT / name).exists() for name in re.findall(r"\binfra/[\w./-]+\w", text))
    applied = [
        file for command in re.findall(r"kubectl apply[^\n]*", text) for file in re.findall(r"-f (\S+)", command)
    ]
    assert applied
    assert not [file for file in applied if "example" in file]
