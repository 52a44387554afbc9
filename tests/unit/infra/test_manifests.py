"""What infra/ hands to Docker, Kubernetes, Ray's launcher and Grafana, checked without any of them.

Kubernetes documents are held against the API server's own schemas; RayCluster and RayJob against the fields of
ray.io/v1 in KubeRay 1.7.0, and against the operator's CRDs where KUBERAY_CRD_DIR names the folder with
ray.io_rayclusters.yaml and ray.io_rayjobs.yaml. The rest are rules of this project: who may run as what, who reaches
whom, and where secrets may stand.
"""

from __future__ import annotations

import configparser
import copy
import fnmatch
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import dircluster
from dircluster import cli

ROOT = Path(__file__).parents[3]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
EXAMPLE = KUBERAY / "secrets.example.yaml"
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
"""Oldest and newest API that the documents must fit."""

PROJECT_IMAGE = f"registry.example.org/dircluster:{dircluster.__version__}"
OTHER_IMAGES = {"postgres:17-bookworm"}
FOUND_IN_EVERY_NAMESPACE = {"kube-root-ca.crt"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
"""Labels of the operator's pod, as its Helm chart sets them."""

# The spec fields of ray.io/v1, KubeRay 1.7.0, without those that need a feature gate.
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "upgradeStrategy",
    "workerGroupSpecs",
}
HEAD_FIELDS = {
    "enableIngress",
    "headService",
    "ingressOptions",
    "labels",
    "rayStartParams",
    "resources",
    "serviceType",
    "template",
}
WORKER_FIELDS = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "priority",
    "rayStartParams",
    "replicas",
    "resources",
    "template",
}
AUTOSCALER_FIELDS = {"idleTimeoutSeconds", "upscalingMode", "version"}
AUTOSCALER_CONTAINER_FIELDS = {
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "volumeMounts",
}
AUTH_FIELDS = {"mode", "secretName"}
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "preRunningDeadlineSeconds",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}

SECRETIVE = re.compile(r"key|secret|password|passwd|token|credential", re.IGNORECASE)
USER_IN_URL = re.compile(r"://[^/\s\"']*:[^/\s\"']*@")


class NoDuplicates(yaml.SafeLoader):
    """YAML whose mappings name every key once: PyYAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(file.read_text(), NoDuplicates) if document is not None]


FILES = sorted(KUBERAY.glob("*.yaml"))
DOCUMENTS = [(file.name, document) for file in FILES for document in load(file)]
DEPLOYED = [document for name, document in DOCUMENTS if name != EXAMPLE.name]


def title(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in DEPLOYED if document["kind"] == kind}


@dataclass(frozen=True)
class Pod:
    """A pod that one of the documents makes."""

    where: str
    spec: dict[str, Any]
    labels: dict[str, str]
    ray: bool = False
    autoscaler: dict[str, Any] | None = None

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of them, with the one that the operator puts beside the head."""
        beside = [] if self.autoscaler is None else [self.autoscaler]
        return self.spec.get("initContainers", []) + self.spec["containers"] + beside

    @property
    def manifest(self) -> dict[str, Any]:
        spec = {**self.spec, "containers": self.containers, "initContainers": []}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "wrapped", "labels": self.labels}, "spec": spec}


def ray_pods(where: str, cluster: dict[str, Any]) -> Iterator[Pod]:
    head, options = cluster["headGroupSpec"], cluster.get("autoscalerOptions", {})
    autoscaler = None
    if cluster.get("enableInTreeAutoscaling"):
        own = {name: value for name, value in options.items() if name in AUTOSCALER_CONTAINER_FIELDS}
        autoscaler = {"name": "autoscaler", "image": head["template"]["spec"]["containers"][0]["image"], **own}
    groups = [("head", head["template"], autoscaler)]
    groups += [("worker", group["template"], None) for group in cluster["workerGroupSpecs"]]
    for node, template, beside in groups:
        labels = {**template["metadata"]["labels"], "ray.io/is-ray-node": "yes", "ray.io/node-type": node}
        yield Pod(f"{where} {node}", template["spec"], labels, True, beside)


def pods() -> Iterator[Pod]:
    for document in DEPLOYED:
        where, spec = title(document), document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            template = copy.deepcopy(spec["template"])
            claims = [
                {"name": claim["metadata"]["name"], "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
                for claim in spec.get("volumeClaimTemplates", [])
            ]
            template["spec"]["volumes"] = template["spec"].get("volumes", []) + claims
            yield Pod(where, template["spec"], template["metadata"]["labels"])
        elif document["kind"] == "RayCluster":
            yield from ray_pods(where, spec)
        elif document["kind"] == "RayJob":
            yield from ray_pods(where, spec["rayClusterSpec"])
            template = spec["submitterPodTemplate"]
            yield Pod(f"{where} submitter", template["spec"], template["metadata"]["labels"], True)


PODS = list(pods())
CONTAINERS = [(pod, container) for pod in PODS for container in pod.containers]
each_pod = pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.where)
each_container = pytest.mark.parametrize(
    ("pod", "container"), CONTAINERS, ids=[f"{pod.where} {container['name']}" for pod, container in CONTAINERS]
)
RAY_CLUSTERS = {
    **{title(document): document["spec"] for document in DEPLOYED if document["kind"] == "RayCluster"},
    **{title(document): document["spec"]["rayClusterSpec"] for document in DEPLOYED if document["kind"] == "RayJob"},
}
SECRETS = {secret["metadata"]["name"]: secret["stringData"] for secret in load(EXAMPLE)}


# ---- documents against schemas


def test_what_is_checked_is_there() -> None:
    assert {"Namespace", "ConfigMap", "ServiceAccount", "NetworkPolicy", "Service", "Deployment", "StatefulSet"} <= {
        document["kind"] for document in DEPLOYED
    }
    assert len(RAY_CLUSTERS) == 2
    assert {container["name"] for _, container in CONTAINERS} == {
        "ray-head",
        "autoscaler",
        "ray-worker",
        "ray-job-submitter",
        "mlflow",
        "postgres",
    }


@pytest.mark.parametrize("file", sorted([*INFRA.rglob("*.yaml"), *INFRA.rglob("*.yml")]), ids=lambda file: file.name)
def test_every_yaml_file_parses_and_names_no_key_twice(file: Path) -> None:
    assert load(file)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(
    ("name", "document"),
    [(name, document) for name, document in DOCUMENTS if not document["apiVersion"].startswith("ray.io/")],
    ids=lambda value: value if isinstance(value, str) else title(value),
)
def test_core_documents_fit_their_schemas(name: str, document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
@each_pod
def test_pod_templates_fit_the_schema_of_a_pod(pod: Pod, version: str) -> None:
    kubernetes_validate.validate(pod.manifest, version, strict=True)


def test_a_misspelt_field_of_a_pod_would_be_noticed() -> None:
    wrong = copy.deepcopy(PODS[0].manifest)
    wrong["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[1], strict=True)


@pytest.mark.parametrize("where", RAY_CLUSTERS)
def test_ray_clusters_use_fields_that_the_operator_knows(where: str) -> None:
    cluster = RAY_CLUSTERS[where]
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["authOptions"]) <= AUTH_FIELDS
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER_FIELDS | AUTOSCALER_CONTAINER_FIELDS
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert set(group["template"]) <= {"metadata", "spec"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_ray_documents_are_of_the_operators_api() -> None:
    ray = [document for document in DEPLOYED if document["kind"].startswith("Ray")]
    assert {document["apiVersion"] for document in ray} == {"ray.io/v1"}
    assert all(set(document) == {"apiVersion", "kind", "metadata", "spec"} for document in ray)
    for job in of_kind("RayJob").values():
        assert set(job["spec"]) <= JOB_FIELDS
        assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}


def strict(schema: Any) -> Any:
    """A CRD's structural schema as JSON Schema that refuses what it does not name, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not free:
        closed["additionalProperties"] = False
    return closed


def crd_schema(file: Path) -> Any:
    """The strict schema of version v1 in a CustomResourceDefinition."""
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    return strict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_ray_documents_fit_the_operators_crds(kind: str) -> None:
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if folder is None:
        pytest.skip("set KUBERAY_CRD_DIR to the folder with KubeRay's ray.io_rayclusters.yaml and ray.io_rayjobs.yaml")
    schema = crd_schema(Path(folder) / f"ray.io_{kind.lower()}s.yaml")
    for document in of_kind(kind).values():
        jsonschema.validate(document, schema)


def test_a_crd_made_strict_refuses_what_it_does_not_name(tmp_path: Path) -> None:
    inner = {
        "type": "object",
        "properties": {
            "port": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "items": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
        },
    }
    whole = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": inner}}
    versions = [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": whole}}]
    file = tmp_path / "crd.yaml"
    file.write_text(yaml.safe_dump({"spec": {"versions": versions}}))
    schema = crd_schema(file)
    fine = {"metadata": {"name": "x"}, "spec": {"port": "http", "labels": {"any": "thing"}, "items": [{"name": "a"}]}}
    jsonschema.validate(fine, schema)
    for wrong in ({"prot": 1}, {"labels": {"any": 1}}, {"items": [{"nmae": "a"}]}, {"port": 1.5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"spec": wrong}, schema)


# ---- what pods may do


@each_pod
def test_a_pod_gets_nothing_of_its_node_or_of_the_api_server(pod: Pod) -> None:
    assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName"} & set(pod.spec)
    assert not [volume for volume in pod.spec["volumes"] if "hostPath" in volume]
    assert pod.spec["automountServiceAccountToken"] is False
    assert pod.spec["enableServiceLinks"] is False, "the Service mlflow would set MLFLOW_PORT in every pod"
    tokens = {
        volume["name"]
        for volume in pod.spec["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
        if "serviceAccountToken" in source
    }
    holders = [
        container["name"]
        for container in pod.containers
        for mount in container.get("volumeMounts", [])
        if mount["name"] in tokens
    ]
    assert holders == (["autoscaler"] if pod.autoscaler else [])


@each_container
def test_a_container_has_no_privileges(pod: Pod, container: dict[str, Any]) -> None:
    outer, inner = pod.spec["securityContext"], container["securityContext"]
    both = {**outer, **inner}
    assert both["runAsNonRoot"] is True
    assert both["runAsUser"] > 0
    assert both["runAsGroup"] > 0
    assert both["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert not inner.get("privileged", False)
    if container["name"] != "autoscaler":  # the operator adds folders to it that it writes to
        assert inner["readOnlyRootFilesystem"] is True


@each_container
def test_a_container_says_what_it_needs(pod: Pod, container: dict[str, Any]) -> None:
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == ("1" if container["name"] == "ray-worker" else None)


def test_images_are_this_version_and_pinned() -> None:
    images = {container["image"] for _, container in CONTAINERS}
    assert images == {PROJECT_IMAGE} | OTHER_IMAGES
    assert load(INFRA / "aws" / "cluster.yaml")[0]["docker"]["image"] == PROJECT_IMAGE
    for text in (INFRA / "Dockerfile", INFRA / "README.md"):
        assert set(re.findall(r"registry\.example\.org/\S+?:[\w.]+", text.read_text())) <= {PROJECT_IMAGE}, text


# ---- secrets


def literals() -> Iterator[tuple[str, str, str]]:
    for pod, container in CONTAINERS:
        for variable in container.get("env", []):
            if "value" in variable:
                yield pod.where, variable["name"], variable["value"]
    for name, config in of_kind("ConfigMap").items():
        for key, value in config["data"].items():
            yield f"ConfigMap/{name}", key, value


def test_no_environment_variable_holds_a_secret() -> None:
    for where, name, value in literals():
        if name.endswith(("_FILE", "_PATH")):
            assert value.startswith("/"), (where, name)
        elif SECRETIVE.search(name):
            assert value == "", (where, name)


def test_one_secret_comes_through_the_environment_and_by_reference() -> None:
    by_reference = {
        variable["name"]
        for _, container in CONTAINERS
        for variable in container.get("env", [])
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    assert by_reference == {"MLFLOW_FLASK_SERVER_SECRET_KEY"}  # MLflow reads it from nowhere else
    sources = [source for _, container in CONTAINERS for source in container.get("envFrom", [])]
    assert all(set(source) == {"configMapRef"} for source in sources)


def test_secrets_exist_as_placeholders_only() -> None:
    assert not of_kind("Secret")
    for name, files in SECRETS.items():
        for file, content in files.items():
            values = re.findall(r"(?m)^\S*(?:key|password|token)\S*\s*=\s*(.*)$", content) or [content]
            assert set(values) == {"REPLACE-ME"}, (name, file)


def test_files_that_variables_name_are_mounted_secrets() -> None:
    seen = set()
    for pod, container in CONTAINERS:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for variable in container.get("env", []):
            if not variable.get("value", "").startswith("/run/secrets/"):
                continue
            folder, _, file = variable["value"].rpartition("/")
            mount = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == folder)
            secret = volumes[mount["name"]]["secret"]
            keys = {item["path"]: item["key"] for item in secret.get("items", [])} or {file: file}
            assert keys[file] in SECRETS[secret["secretName"]], (pod.where, variable)
            assert mount["readOnly"] is True
            seen.add(variable["name"])
    assert {"RAY_AUTH_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "MLFLOW_AUTH_CONFIG_PATH", "PGSERVICEFILE"} <= seen


@each_pod
def test_mounted_secrets_can_be_read_by_the_pods_group_alone(pod: Pod) -> None:
    for volume in pod.spec["volumes"]:
        source = volume.get("secret") or volume.get("projected")
        if source is not None:
            assert source["defaultMode"] == 0o440, volume["name"]
            assert pod.spec["securityContext"]["fsGroup"] == pod.spec["securityContext"]["runAsGroup"]


def test_mlflow_finds_its_user_in_the_mounted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.utils.credentials import read_mlflow_creds

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    for file, content in SECRETS["mlflow-client"].items():
        (tmp_path / ".mlflow" / file).write_text(content)
    found = read_mlflow_creds()
    assert (found.username, found.password) == ("trainer", "REPLACE-ME")
    for pod, container in CONTAINERS:
        if container["name"] in ("ray-head", "ray-worker"):
            homes = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert homes["/home/dircluster/.mlflow"] == "mlflow-client", pod.where


def test_mlflows_server_and_database_files_agree() -> None:
    server, services = configparser.ConfigParser(), configparser.ConfigParser()
    server.read_string(SECRETS["mlflow-server"]["basic_auth.ini"])
    services.read_string(SECRETS["mlflow-server"]["pg_service.conf"])
    uri = option("mlflow", "--backend-store-uri")
    assert server["mlflow"]["database_uri"] == uri == f"postgresql+psycopg2:///?service={services.sections()[0]}"
    assert server["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert {"admin_username", "admin_password"} <= set(server["mlflow"])
    address = services["mlflow"]
    assert of_kind("Service")[address["host"]]["spec"]["ports"][0]["port"] == int(address["port"])
    environment = {
        variable["name"]: variable.get("value")
        for _, container in CONTAINERS
        if container["name"] == "postgres"
        for variable in container["env"]
    }
    assert (environment["POSTGRES_USER"], environment["POSTGRES_DB"]) == (address["user"], address["dbname"])


def option(container: str, name: str) -> str:
    """What follows ``name=`` among a container's arguments."""
    (found,) = [box for _, box in CONTAINERS if box["name"] == container]
    (value,) = [word.partition("=")[2] for word in found["args"] if word.startswith(f"{name}=")]
    return value


def test_mlflow_answers_to_the_name_that_pods_use() -> None:
    assert option("mlflow", "--app-name") == "basic-auth"
    hosts = option("mlflow", "--allowed-hosts").split(",")
    assert "*" not in hosts
    uri = of_kind("ConfigMap")["dircluster-env"]["data"]["MLFLOW_TRACKING_URI"]
    assert uri.removeprefix("http://") in hosts
    assert uri.removeprefix("http://").partition(":")[0] in of_kind("Service")


# ---- Ray


@pytest.mark.parametrize("pod", [pod for pod in PODS if pod.ray], ids=lambda pod: pod.where)
def test_every_ray_container_asks_for_the_token(pod: Pod) -> None:
    for container in pod.spec["containers"]:
        own = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert own["RAY_AUTH_MODE"] == "token"
        assert own["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray/auth_token"
        assert own["RAY_AUTH_TOKEN"] == ""  # so the operator does not fill it in


@pytest.mark.parametrize("where", RAY_CLUSTERS)
def test_a_ray_cluster(where: str) -> None:
    cluster = RAY_CLUSTERS[where]
    locked = re.search(r"(?m)^ray==(\S+)", (ROOT / "requirements.lock").read_text())
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]
    assert cluster["authOptions"]["mode"] == "token"
    assert "auth_token" in SECRETS[cluster["authOptions"]["secretName"]]
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress", False)
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("pod", [pod for pod in PODS if "ray.io/node-type" in pod.labels], ids=lambda pod: pod.where)
def test_a_job_that_is_stopped_has_time_to_commit(pod: Pod) -> None:
    own = {variable["name"]: variable.get("value") for variable in pod.spec["containers"][0]["env"]}
    drain = int(own["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert pod.spec["terminationGracePeriodSeconds"] > drain
    if pod.labels["ray.io/node-type"] == "head":
        assert drain >= int(own["RAY_JOB_STOP_WAIT_TIME_S"]) == 60


def test_the_job_brings_the_cluster_that_stays() -> None:
    assert RAY_CLUSTERS["RayJob/cifar10"] == RAY_CLUSTERS["RayCluster/dircluster"]


def test_the_job_is_one_that_the_command_line_takes() -> None:
    for job in of_kind("RayJob").values():
        spec = job["spec"]
        python, script, *words = spec["entrypoint"].split()
        assert python == "python"
        assert (ROOT / script).is_file()
        run = cli.parse(cli.TrainJob, words).run
        assert run.scaling.device == "gpu"
        group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
        assert f"{group['minReplicas']}:{group['maxReplicas']}" == str(run.scaling.workers)
        assert spec["backoffLimit"] > 0
        assert "runtimeEnvYAML" not in spec
        artifacts = option("mlflow", "--artifacts-destination")
        assert run.storage.uri.startswith("s3://")
        assert Path(artifacts).parent == Path(run.storage.uri).parent
        assert artifacts != run.storage.uri


# ---- references


@each_pod
def test_what_a_pod_names_exists(pod: Pod) -> None:
    configs = set(of_kind("ConfigMap"))
    assert pod.spec["serviceAccountName"] in of_kind("ServiceAccount")
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
    assert mounted == set(volumes)
    for volume in volumes.values():
        if "secret" in volume:
            keys = SECRETS[volume["secret"]["secretName"]]
            assert {item["key"] for item in volume["secret"].get("items", [])} <= set(keys)
        for source in volume.get("projected", {}).get("sources", []):
            if "configMap" in source:
                assert source["configMap"]["name"] in configs | FOUND_IN_EVERY_NAMESPACE
    for container in pod.containers:
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in configs
        for variable in container.get("env", []):
            origin = variable.get("valueFrom", {})
            if "secretKeyRef" in origin:
                assert origin["secretKeyRef"]["key"] in SECRETS[origin["secretKeyRef"]["name"]]
            if "configMapKeyRef" in origin:
                name, key = origin["configMapKeyRef"]["name"], origin["configMapKeyRef"]["key"]
                assert key in of_kind("ConfigMap")[name]["data"]


def test_every_secret_of_the_example_is_used() -> None:
    used = {volume["secret"]["secretName"] for pod in PODS for volume in pod.spec["volumes"] if "secret" in volume}
    assert used == set(SECRETS)


def test_everything_lives_in_one_namespace() -> None:
    (namespace,) = of_kind("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [document for _, document in DOCUMENTS if document["kind"] != "Namespace"]
    assert {document["metadata"]["namespace"] for document in others} == {namespace["metadata"]["name"]}
    names = [title(document) for document in DEPLOYED]
    assert len(names) == len(set(names))
    assert all(account["automountServiceAccountToken"] is False for account in of_kind("ServiceAccount").values())


def test_services_are_for_the_cluster_alone() -> None:
    assert not of_kind("Ingress")
    for name, service in of_kind("Service").items():
        assert service["spec"]["type"] == "ClusterIP"
        (pod,) = [pod for pod in PODS if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        (container,) = pod.spec["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


# ---- the network


@dataclass(frozen=True)
class Peer:
    """Somebody who talks or is talked to: a pod by its labels, or an address outside."""

    labels: dict[str, str]
    namespace: str = "dircluster"
    address: str | None = None


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "this test reads matchLabels only"
    return selector.get("matchLabels", {}).items() <= labels.items()


def admits(rule: dict[str, Any], way: str, peer: Peer, port: int) -> bool:
    if port not in [allowed["port"] for allowed in rule.get("ports", [{"port": port}])]:
        return False
    for side in rule.get(way, [{"podSelector": {}, "namespaceSelector": {}}]):
        if "ipBlock" in side:
            block = side["ipBlock"]
            assert block["cidr"] == "0.0.0.0/0"
            out = [pattern.partition("/")[0].removesuffix(".0.0") + ".*" for pattern in block.get("except", [])]
            if peer.address is not None and not any(fnmatch.fnmatch(peer.address, pattern) for pattern in out):
                return True
        elif peer.address is None:
            where = {"kubernetes.io/metadata.name": peer.namespace}
            inside = matches(side["namespaceSelector"], where) if "namespaceSelector" in side else None
            if (peer.namespace == "dircluster" if inside is None else inside) and matches(
                side.get("podSelector", {}), peer.labels
            ):
                return True
    return False


def passes(kind: str, pod: Peer, other: Peer, port: int) -> bool:
    """Whether the policies that select ``pod`` let traffic to (Egress) or from (Ingress) ``other`` through."""
    if pod.namespace != "dircluster" or pod.address is not None:
        return True  # policies of this folder do not select it
    way = "to" if kind == "Egress" else "from"
    chosen = [
        policy["spec"]
        for policy in of_kind("NetworkPolicy").values()
        if kind in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    assert chosen, "the default policy selects every pod"
    return any(admits(rule, way, other, port) for spec in chosen for rule in spec.get(kind.lower(), []))


def reaches(one: Peer, other: Peer, port: int) -> bool:
    return passes("Egress", one, other, port) and passes("Ingress", other, one, port)


BY_NAME = {pod.where.rpartition(" ")[2].rpartition("/")[2]: Peer(pod.labels) for pod in PODS}
PEERS = {
    **BY_NAME,
    "operator": Peer(OPERATOR, "kuberay-system"),
    "beside the operator": Peer({}, "kuberay-system"),
    "prometheus": Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "stranger": Peer({"ray.io/is-ray-node": "yes", **OPERATOR}, "default"),
    "dns": Peer({"k8s-app": "kube-dns"}, "kube-system"),
    "bucket": Peer({}, address="3.5.134.1"),
    "node's credentials": Peer({}, address="169.254.169.254"),
}


@pytest.mark.parametrize(
    ("one", "other", "port", "expected"),
    [
        ("worker", "head", 6379, True),
        ("head", "worker", 31000, True),
        ("worker", "worker", 40000, True),
        ("submitter", "head", 8265, True),
        ("submitter", "head", 6379, False),
        ("submitter", "worker", 40000, False),
        ("submitter", "bucket", 443, False),
        ("operator", "head", 8265, True),
        ("operator", "head", 6379, False),
        ("beside the operator", "head", 8265, False),
        ("stranger", "head", 8265, False),
        ("stranger", "head", 10001, False),
        ("bucket", "head", 8265, False),
        ("prometheus", "worker", 8080, True),
        ("prometheus", "head", 8080, True),
        ("prometheus", "head", 8265, False),
        ("head", "mlflow", 5000, True),
        ("worker", "mlflow", 5000, True),
        ("stranger", "mlflow", 5000, False),
        ("submitter", "mlflow", 5000, False),
        ("mlflow", "postgres", 5432, True),
        ("worker", "postgres", 5432, False),
        ("mlflow", "head", 8265, False),
        ("worker", "submitter", 80, False),
        ("postgres", "bucket", 443, False),
        ("postgres", "mlflow", 5000, False),
        ("worker", "bucket", 443, True),
        ("head", "bucket", 443, True),
        ("mlflow", "bucket", 443, True),
        ("worker", "bucket", 80, False),
        ("head", "bucket", 6443, True),
        ("worker", "bucket", 6443, False),
        ("worker", "node's credentials", 80, False),
        ("head", "node's credentials", 443, False),
        ("mlflow", "node's credentials", 443, False),
        ("worker", "dns", 53, True),
        ("mlflow", "dns", 53, True),
    ],
)
def test_who_reaches_whom(one: str, other: str, port: int, expected: bool) -> None:
    assert reaches(PEERS[one], PEERS[other], port) is expected


def test_nothing_is_allowed_that_is_not_named() -> None:
    everything = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert everything in [policy["spec"] for policy in of_kind("NetworkPolicy").values()]


def test_every_policy_selects_somebody() -> None:
    for name, policy in of_kind("NetworkPolicy").items():
        assert any(matches(policy["spec"]["podSelector"], pod.labels) for pod in PODS), name
        for kind, way in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(kind, []):
                for side in rule[way]:
                    if set(side) == {"podSelector"}:
                        assert any(matches(side["podSelector"], pod.labels) for pod in PODS), name


# ---- Ray's launcher on EC2


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    """aws/cluster.yaml as Ray's launcher understands it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(load(INFRA / "aws" / "cluster.yaml")[0])
    validate_config(prepared)
    return prepared


def test_rays_launcher_takes_the_file_and_adds_nothing_to_it(launcher: dict[str, Any]) -> None:
    assert launcher["provider"]["type"] == "aws"
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    assert all(launcher[name] == [] for name in commands), "the launcher's defaults install another Ray"


def test_workers_on_ec2_are_spot_and_none_while_nothing_runs(launcher: dict[str, Any]) -> None:
    kinds = launcher["available_node_types"]
    head, workers = kinds[launcher["head_node_type"]], [kind for name, kind in kinds.items() if name != "head"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    for worker in workers:
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert (worker["min_workers"], worker["max_workers"]) == (0, 4)
        assert worker["resources"]["GPU"] == 1


def test_nodes_on_ec2_have_roles_and_no_keys(launcher: dict[str, Any]) -> None:
    profiles = set()
    for kind in launcher["available_node_types"].values():
        node = kind["node_config"]
        profiles.add(node["IamInstanceProfile"]["Name"])
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["SecurityGroupIds"], "without one the launcher opens SSH to everybody"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert len(profiles) == 2
    text = (INFRA / "aws" / "cluster.yaml").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key|aws_access_key_id", text, re.IGNORECASE)
    assert not re.search(r"\b\d{12}\b", text), "an account number"
    assert not USER_IN_URL.search(text)


def test_ray_on_ec2_asks_for_the_token_and_shows_its_dashboard_to_nobody(launcher: dict[str, Any]) -> None:
    docker = launcher["docker"]
    options = [word for option in docker["run_options"] + docker["head_run_options"] for word in option.split()]
    environment = dict(word.split("=", 1) for flag, word in itertools.pairwise(options) if flag == "--env")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) == 60
    assert not [name for name, value in environment.items() if SECRETIVE.search(name) and value]
    assert not {"--privileged", "--user=root"} & set(options)
    assert launcher["file_mounts"]["/home/dircluster/.ray"] == "~/.ray"
    (start,) = [command for command in launcher["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert re.search(r"ssh_user: (\w+)", (INFRA / "aws" / "cluster.yaml").read_text())


# ---- the image


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines()]


STEPS = instructions(INFRA / "Dockerfile")


def arguments(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def test_the_base_of_the_image_is_pinned() -> None:
    assert arguments("FROM")
    for base in arguments("FROM"):
        image = base.split()[0]
        assert re.fullmatch(r"python:3\.11-slim-\w+(@sha256:[0-9a-f]{64})?", image), image


def test_the_image_does_not_run_as_root() -> None:
    assert STEPS[-2:][0][0] == "USER"
    assert arguments("USER") == ["1000:1000"]
    assert any("useradd --uid 1000" in step for step in arguments("RUN"))


def test_what_the_image_installs_is_locked() -> None:
    installs = [command for step in arguments("RUN") for command in step.split("&&") if "pip install" in command]
    assert len(installs) == 3
    for command in installs:
        if " -r " in command:
            assert {"--require-hashes", "--compile"} <= set(command.split()), command
        else:
            assert {"--no-deps", "--no-index", "--no-build-isolation", "--compile"} <= set(command.split()), command


def test_the_image_fetches_nothing_else_and_holds_no_secret() -> None:
    assert not arguments("ADD")
    text = " ".join(rest for _, rest in STEPS)
    assert not re.search(r"curl|wget|git clone|https?://", text)
    named = [word.partition("=")[0] for kind in ("ENV", "ARG") for rest in arguments(kind) for word in rest.split()]
    assert not [name for name in named if SECRETIVE.search(name)]
    assert "--mount=type=secret" not in text


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in seen)
    copied = {step.split()[0] for step in arguments("COPY")}
    bound = {source for step in arguments("RUN") for source in re.findall(r"type=bind,source=([^,]+)", step)} - {"."}
    built = {"dircluster", "pyproject.toml", "README.md", "LICENSE"}  # what setuptools reads
    assert seen == copied | bound | built


def pins(lock: Path) -> dict[str, str]:
    """The version of each package in a lock file; every one has a hash."""
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text())
    found: dict[str, str] = {}
    for entry in filter(None, entries):
        name, version = re.match(r"([\w.-]+)==([\w.+]+)", entry).groups()  # type: ignore[union-attr]
        assert "--hash=sha256:" in entry, name
        found[name] = version
    return found


def test_the_servers_lock_stays_within_the_projects() -> None:
    from importlib.metadata import requires

    server = pins(INFRA / "requirements-server.lock")
    assert set(server) == {"psycopg2-binary", "flask-wtf", "wtforms"}
    for lock in (ROOT / "requirements.lock", ROOT / "tests" / "requirements.lock"):  # tests use mlflow[auth] too
        assert all(pins(lock).get(name, version) == version for name, version in server.items())
    needs = [need for need in requires("mlflow") or [] if 'extra == "auth"' in need]
    assert [re.match(r"[\w-]+", need)[0].lower() for need in needs] == ["flask-wtf"]  # type: ignore[index]


# ---- metrics


def queries() -> str:
    dashboard = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return "\n".join(panels + [variable["query"] for variable in dashboard["templating"]["list"]])


def test_the_dashboard_shows_what_runs_export() -> None:
    from dircluster.cluster.runtime.channel import GAUGES

    asked = {name.removeprefix("ray_") for name in re.findall(r"ray_dircluster_\w+", queries())}
    assert asked == set(GAUGES)
    assert not re.search(r"(?<!ray_)\bdircluster_", queries()), "Ray's prefix is missing"
    assert not set(re.findall(r"(?:by|without)\s*\((.*?)\)", queries())) - {"run, stage"}


def test_the_dashboard_shows_what_ray_exports() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = {name.removeprefix("ray_") for name in re.findall(r"ray_node_\w+", queries())}
    assert {"node_gpus_utilization", "node_mem_used", "node_cpu_utilization"} <= asked <= set(METRICS_GAUGES)


def test_the_dashboard_is_well_formed() -> None:
    dashboard = json.loads((INFRA / "grafana" / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        right, bottom = place["x"] + place["w"], place["y"] + place["h"]
        assert right <= 24
        cells = set(itertools.product(range(place["x"], right), range(place["y"], bottom)))
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"]["uid"] == "${datasource}"


def test_prometheus_scrapes_the_pods_there_are() -> None:
    (config,) = load(INFRA / "grafana" / "prometheus.yml")
    job = next(job for job in config["scrape_configs"] if "kubernetes_sd_configs" in job)
    assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == list(of_kind("Namespace"))
    kept = {rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"}
    assert kept["__meta_kubernetes_pod_label_ray_io_is_ray_node"] == "yes"
    for pod in PODS:
        if "ray.io/node-type" in pod.labels:
            ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
            assert ports[kept["__meta_kubernetes_pod_container_port_name"]] == 8080


# ---- the text


def test_no_file_names_this_machine_an_index_or_a_secret() -> None:
    for file in sorted(INFRA.rglob("*")):
        if not file.is_file() or file.suffix in {".pyc", ".png"}:
            continue
        text = file.read_text()
        assert not re.search(r"pypi|pythonhosted|index-url[= ]+http", text), file
        assert not re.search(r"(?<![\w~.])/(work|Users|mnt|root/(?!\.cache/pip))", text), file
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN", text), file
        assert not USER_IN_URL.search(text), file


def test_the_readme_names_files_that_exist_and_applies_no_placeholder() -> None:
    text = (INFRA / "README.md").read_text()
    named = set(re.findall(r"\binfra/[\w./-]+\w", text))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
    for command in re.findall(r"kubectl apply[^\n]*", text):
        files = re.findall(r"-f (\S+)", command)
        assert files
        assert all((ROOT / file).is_file() and Path(file) != EXAMPLE.relative_to(ROOT) for file in files), command
