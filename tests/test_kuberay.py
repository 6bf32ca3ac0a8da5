"""deploy/kuberay offline: the fields, types and needs of KubeRay's RayCluster, RayJob, RayService.

FIELDS is the part of the custom resource definitions (ray.io/v1, KubeRay 1.5.1 to 1.6) that the
manifests use, so an unknown field or a wrong type is found here instead of by `kubectl apply`.
NAMES are all fields of the definitions' upper levels, and FIELDS may have no others: those of a
cluster are copied from helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml of commit 017710c
(its pods are those of Kubernetes 1.35), those of a job and a service from the types of commit
0057210, of which the definitions are made. The pods were checked once with the models of the
package kubernetes 37.0.2, which refuse unknown fields: they had none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[1] / "deploy/kuberay"
MANIFESTS = {"RayCluster": "raycluster", "RayJob": "rayjob", "RayService": "rayservice"}

Schema = Any
"""A type, a tuple of allowed values, [schema] for a list, or a dict of fields (`!` if needed)."""

TOKEN = {"secretKeyRef!": {"name!": str, "key!": str, "optional": bool}}
QUANTITIES = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
POD: Schema = {
    "spec!": {
        "serviceAccountName": str,
        "tolerations": [{"key": str, "operator": ("Exists", "Equal"), "effect": str}],
        "containers!": [
            {
                "name!": str,
                "image!": str,
                "env": [{"name!": str, "valueFrom!": TOKEN}],
                "ports": [{"containerPort!": int, "name": str}],
                "resources": {"limits": QUANTITIES, "requests": QUANTITIES},
                "volumeMounts": [{"mountPath!": str, "name!": str}],
            }
        ],
        "volumes": [
            {"name!": str, "emptyDir": {"medium": ("", "Memory"), "sizeLimit": str}},
        ],
    }
}
ENDPOINT_TOKEN = [
    {
        "name": "KARMA_RAY_TOKEN",
        "valueFrom": {
            "secretKeyRef": {"name": "karma-ray-endpoint", "key": "token", "optional": True}
        },
    }
]
CLUSTER: Schema = {
    "rayVersion": str,
    "authOptions": {"mode": ("disabled", "token")},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int},
    "headGroupSpec!": {
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
        "rayStartParams": {"num-cpus": str},
        "template!": POD,
    },
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": {},
            "template!": POD,
        }
    ],
}
FIELDS: dict[str, Schema] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "submitterConfig": {"backoffLimit": int},
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER},
}


NAMES: dict[str, set[str]] = {
    "cluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
        "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend",
        "ttlSecondsAfterIdle", "upgradeStrategy", "workerGroupSpecs",
    },
    "authOptions": {"enableK8sTokenAuth", "mode"},
    "autoscalerOptions": {
        "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources",
        "securityContext", "upscalingMode", "version", "volumeMounts",
    },
    "headGroupSpec": {
        "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType",
        "template",
    },
    "workerGroupSpecs": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts",
        "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy",
        "entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId",
        "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML", "schedule",
        "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate",
        "suspend", "ttlSecondsAfterFinished",
    },
    "submitterConfig": {"backoffLimit"},
    "RayService": {
        "deploymentUnhealthySecondThreshold", "excludeHeadPodFromServeSvc", "rayClusterConfig",
        "serveConfigV2", "serveService", "serviceUnhealthySecondThreshold", "upgradeStrategy",
    },
}  # fmt: skip


def levels(schema: Schema, name: str) -> Iterator[tuple[str, set[str]]]:
    """The fields of every level of `schema`, by the name that NAMES has for it."""
    for part in schema if isinstance(schema, list) else [schema]:
        if isinstance(part, dict) and name in NAMES:
            yield name, {field.rstrip("!") for field in part}
            for field, inner in part.items():
                cluster = field in ("rayClusterSpec", "rayClusterConfig")
                yield from levels(inner, "cluster" if cluster else field.rstrip("!"))


def complaints(value: Any, schema: Schema, where: str) -> Iterator[str]:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{where} is no record"
            return
        fields = {name.rstrip("!"): part for name, part in schema.items()}
        yield from (f"{where}.{name} is not known" for name in value if name not in fields)
        for name, part in schema.items():
            if name.rstrip("!") in value:
                yield from complaints(value[name.rstrip("!")], part, f"{where}.{name.rstrip('!')}")
            elif name.endswith("!"):
                yield f"{where}.{name.rstrip('!')} is missing"
    elif isinstance(schema, list):
        for number, item in enumerate(value):
            yield from complaints(item, schema[0], f"{where}[{number}]")
    elif isinstance(schema, tuple):
        if value not in schema:
            yield f"{where} is {value!r}, not one of {schema}"
    elif type(value) is not schema:
        yield f"{where} is {value!r}, not of type {schema.__name__}"


def load(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{MANIFESTS[kind]}.yaml").read_text())
    return found


def cluster_of(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(kind)["spec"]
    return next((spec[n] for n in ("rayClusterSpec", "rayClusterConfig") if n in spec), spec)


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for g in groups for container in g["template"]["spec"]["containers"]]


by_kind = pytest.mark.parametrize("kind", MANIFESTS)


@by_kind
def test_every_field_is_one_of_the_custom_resource(kind: str) -> None:
    manifest = load(kind)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert list(complaints(manifest["spec"], FIELDS[kind], "spec")) == []


def test_no_level_has_a_field_that_the_definition_lacks() -> None:
    found = [
        *levels(CLUSTER, "cluster"), *levels(FIELDS["RayJob"], "RayJob"),
        *levels(FIELDS["RayService"], "RayService"),
    ]  # fmt: skip
    assert {name for name, _ in found} == set(NAMES)
    assert {name: fields - NAMES[name] for name, fields in found if fields - NAMES[name]} == {}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("maxReplicas",), 3, "spec.maxReplicas is not known"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "is 0, not of type str"),
        (("headGroupSpec", "serviceType"), "Public", "'Public', not one of"),
        (("headGroupSpec", "template"), {}, "spec.headGroupSpec.template.spec is missing"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(
    path: tuple[str, ...], value: Any, complaint: str
) -> None:
    spec = copy.deepcopy(cluster_of("RayCluster"))
    part = spec
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert complaint in "; ".join(complaints(spec, CLUSTER, "spec"))


@by_kind
def test_pods_have_limits_rights_shared_memory_and_one_image(kind: str) -> None:
    spec = cluster_of(kind)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert pod["serviceAccountName"] == "karma-ray"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount == {"mountPath": "/dev/shm", "name": volume["name"]}
        assert volume["emptyDir"]["medium"] == "Memory"
    assert len(images) == 1
    assert groups[0]["rayStartParams"] == {"num-cpus": "0"}


@by_kind
def test_workers_come_and_go_and_nothing_listens_outside_the_cluster(kind: str) -> None:
    spec = cluster_of(kind)
    assert spec["enableInTreeAutoscaling"] and spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    assert all(g["minReplicas"] == 0 < g["maxReplicas"] for g in groups.values())
    limits = [
        g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups.values()
    ]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, "1"]


def test_the_three_describe_the_same_cluster_which_runs_the_pinned_ray() -> None:
    first, job, service = (cluster_of(k) for k in ("RayCluster", "RayJob", "RayService"))
    for container in containers(job):
        assert "env" not in container  # a training needs no token of an endpoint
    for container in [*containers(first), *containers(service)]:
        assert container.pop("env") == ENDPOINT_TOKEN
    assert job == first
    head = service["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["ports"].pop() == {"containerPort": 8000, "name": "serve"}
    assert service == first
    constraints = (FOLDER.parents[1] / "constraints.txt").read_text().splitlines()
    assert f"ray=={first['rayVersion']}" in constraints
    assert f"rayproject/ray:{first['rayVersion']}-" in (FOLDER / "Dockerfile").read_text()


def test_rights_come_from_the_account_and_no_file_holds_a_key() -> None:
    account = yaml.safe_load((FOLDER / "service-account.yaml").read_text())
    assert account["metadata"]["name"] == "karma-ray"
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(
        "karma-ray-worker"
    )
    for path in FOLDER.iterdir():
        text = path.read_text().lower()
        assert not [w for w in ("akia", "aws_secret", "access_key", "password") if w in text]


def test_the_service_names_an_application_that_serve_can_build(tmp_path) -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    from karma_ray.cluster.service import ServiceArguments, application
    from karma_ray.cluster.serving import APPLICATION
    from karma_ray.errors import InputError, KarmaRayError
    from karma_ray.serving.request_log import LogSettings
    from karma_ray.serving.slow_clients import CALLBACK

    written = yaml.safe_load((FOLDER.parent / "serve.yaml").read_text())
    assert yaml.safe_load(load("RayService")["spec"]["serveConfigV2"]) == written
    config = ServeDeploySchema.model_validate(written)
    # Serve ignores fields that it does not know.
    assert set(written) <= set(ServeDeploySchema.model_fields)
    assert set(written["applications"][0]) <= set(ServeApplicationSchema.model_fields)
    assert set(written["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    assert config.proxy_location == "EveryNode" and config.controller_options is not None
    variables = config.controller_options.runtime_env["env_vars"]
    assert variables.pop("RAY_SERVE_ENABLE_DIRECT_INGRESS") == "0" and variables == CALLBACK
    (described,) = config.applications
    assert described.name == APPLICATION
    assert described.import_path == f"{application.__module__}:{application.__name__}"
    arguments = ServiceArguments.model_validate(described.args)
    with pytest.raises(KarmaRayError):
        application({**arguments.model_dump(), "run": str(tmp_path)})
    assert arguments.log() is None
    logged = ServiceArguments(run="r", log_requests="-", log_raw=True)
    assert logged.log() == LogSettings("-", raw=True)
    for wrong in ({"log_raw": True}, {"log_requests": "relative.jsonl"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            application({**arguments.model_dump(), **wrong})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_serve_builds_the_application_of_a_run(tmp_path) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from karma_ray.cluster.service import application
    from tests import tiny_run

    tiny_run.write_data(tmp_path)
    found = {"run": tiny_run.write_run(tmp_path), "num_replicas": 2}
    built = call_user_app_builder_with_args_if_necessary(application, found)
    deployment = built._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("retriever", 2)
    grows = call_user_app_builder_with_args_if_necessary(application, {**found, "max_replicas": 4})
    limits = grows._bound_deployment._deployment_config.autoscaling_config
    assert (limits.min_replicas, limits.max_replicas) == (2, 4)
    with pytest.raises(ValueError, match="replicas"):
        call_user_app_builder_with_args_if_necessary(application, {**found, "replicas": 2})


def test_the_job_is_a_command_that_the_image_has() -> None:
    from karma_ray import cli

    words = load("RayJob")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    script = Path(words[1])
    assert script.parts[:4] == ("/", "home", "ray", "karma_ray")
    assert (FOLDER.parents[1] / script.relative_to("/home/ray/karma_ray")).exists()
    flags = words[words.index("--recipe") :]
    parsed = cli.parser("", config=True).parse_args(flags)
    assert cli.load_config(parsed, "toy").training.num_workers == 4


def test_image_and_machines_can_read_a_gguf_file() -> None:
    for path in (FOLDER / "Dockerfile", FOLDER.parents[1] / "cluster.yaml"):
        assert "-c constraints.txt '.[gguf]'" in path.read_text(), path
