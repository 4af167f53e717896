"""KubeRay's API for the fields that our manifest uses: types, enumerations, required fields.

Written by hand after the Go types of `ray.io/v1` (ray-project/kuberay, ray-operator/apis/ray/v1/raycluster_types.go)
and Kubernetes' pod specification. No package that holds the definition itself was found. Fields that the manifest
does not use are left out, so that here, as with `kubectl apply --validate=strict`, a misspelt one is an error.
"""

from typing import Any


def _object(required: tuple[str, ...] = (), /, **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([numkMGTPE]|[KMGTPE]i)?$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
"""Kubernetes takes no number for a text: `num-cpus: 0` would be refused."""
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}

CONTAINER = _object(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    resources=_object(requests=AMOUNTS, limits=AMOUNTS),
    ports=_list(_object(("containerPort",), name=TEXT, containerPort=COUNT | {"maximum": 65535})),
    env=_list(_object(("name",), name=TEXT, value=TEXT)),
    volumeMounts=_list(_object(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
VOLUME = _object(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=_object(("claimName",), claimName=TEXT),
    emptyDir=_object(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
TOLERATION = _object(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = _object(
    ("containers",),
    containers=_list(CONTAINER),
    volumes=_list(VOLUME),
    tolerations=_list(TOLERATION),
    terminationGracePeriodSeconds=COUNT,
)
TEMPLATE = _object(("spec",), spec=POD)
HEAD = _object(
    ("template",),
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
WORKERS = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
RAY_CLUSTER = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_object(("name",), name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}),
    spec=_object(
        ("headGroupSpec",),
        rayVersion=TEXT,
        authOptions=_object(mode={"enum": ["disabled", "token"]}),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=_object(
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, idleTimeoutSeconds=COUNT
        ),
        headGroupSpec=HEAD,
        workerGroupSpecs=_list(WORKERS),
    ),
)
