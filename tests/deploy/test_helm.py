"""The chart, linted and rendered by Helm's own library where it is installed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.deploy.shipped import DEPLOY, version

CHART = DEPLOY / "helm" / "polyclinic-coordinator"


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip(
        "helm_python", reason="Helm's library is not here: pip install helm-python-sdk"
    )


def render(helm: Any, **values: Any) -> dict[str, dict[str, Any]]:
    """Rendered objects by kind."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(values, name="demo", namespace="lab")
    objects = [yaml.safe_load(text) for name, text in texts.items() if name.endswith(".yaml")]
    return {thing["kind"]: thing for thing in objects if thing}


def test_the_chart_is_this_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version(), version())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    used = set(
        re.findall(r"\.Values\.(\w+)", "".join(path.read_text() for path in (CHART / "templates").iterdir()))
    )
    assert used == set(values)


def test_helm_lints_it(helm: Any) -> None:
    report = helm.lint(str(CHART), strict=True)
    assert not report["errors"], report
    assert [one for one in report["messages"] if one["severity"] > 1] == []


def test_the_pod_has_no_rights(helm: Any) -> None:
    pod = render(helm)["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not (pod["hostNetwork"])
    assert not (pod["hostPID"])
    assert not (pod["hostIPC"])
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*pod["initContainers"], *pod["containers"]]:
        rights = container["securityContext"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["readOnlyRootFilesystem"] is rights["runAsNonRoot"] is True
        assert rights["allowPrivilegeEscalation"] is rights["privileged"] is False
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/var/lib/polyclinic", "/tmp"}
        assert container["resources"]["limits"]["memory"]


def test_one_coordinator_whose_home_outlives_it(helm: Any) -> None:
    spec = render(helm)["StatefulSet"]["spec"]
    assert spec["replicas"] == 1
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = spec["volumeClaimTemplates"]
    mounts = spec["template"]["spec"]["containers"][0]["volumeMounts"]
    assert claim["metadata"]["name"] in {mount["name"] for mount in mounts}
    assert spec["template"]["metadata"]["labels"].items() >= spec["selector"]["matchLabels"].items()


def test_8443_in_and_nothing_out(helm: Any) -> None:
    things = render(helm)
    policy = things["NetworkPolicy"]["spec"]
    ports = things["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert [(port["name"], port["containerPort"]) for port in ports] == [("gateway", 8443)]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == [{"ports": [{"port": "gateway", "protocol": "TCP"}]}]
    assert policy["egress"] == []
    labels = things["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    service = things["Service"]["spec"]
    assert service["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert [port["targetPort"] for port in service["ports"]] == ["gateway"]


def test_values_that_people_set(helm: Any) -> None:
    digest = "sha256:" + "0" * 64
    things = render(
        helm,
        image={"repository": "registry.example.org/pc", "digest": digest, "pullSecrets": ["pull"]},
        service={"type": "LoadBalancer", "port": 443, "sourceRanges": ["192.0.2.0/24"]},
        networkPolicy={"from": ["192.0.2.0/24"], "to": ["198.51.100.0/24"]},
        storage={"className": "fast", "size": "5Gi"},
        nodeSelector={"disk": "ssd"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
    )
    pod = things["StatefulSet"]["spec"]["template"]["spec"]
    assert (
        pod["containers"][0]["image"]
        == pod["initContainers"][0]["image"]
        == f"registry.example.org/pc@{digest}"
    )
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert (pod["nodeSelector"], pod["tolerations"][0]["key"]) == ({"disk": "ssd"}, "gpu")
    assert things["Service"]["spec"]["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    policy = things["NetworkPolicy"]["spec"]
    assert policy["ingress"][0]["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    assert policy["egress"] == [{"to": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}]
    assert things["StatefulSet"]["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"
    assert "NetworkPolicy" not in render(helm, networkPolicy={"enabled": False})


@pytest.mark.parametrize(
    "wrong", [{"service": {"port": 0}}, {"image": {"repository": "x", "digest": "latest"}}, {"replicas": 2}]
)
def test_wrong_values_are_refused(helm: Any, wrong: dict[str, Any]) -> None:
    with helm.Chart.load(str(CHART)) as chart, pytest.raises(helm.HelmValuesError):
        chart.validate_schema(wrong)


def test_the_wait_for_provisioning_ends_with_what_provision_writes_last(helm: Any) -> None:
    (wait,) = render(helm)["StatefulSet"]["spec"]["template"]["spec"]["initContainers"]
    assert Path("/var/lib/polyclinic/pki/link.crt").as_posix() in wait["command"][2]
