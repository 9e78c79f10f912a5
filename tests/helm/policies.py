"""Plays NetworkPolicies: who may connect to whom, as Kubernetes defines it. And what must come out."""

from manifests import matches, pods


class Peer:
    """A pod (with labels), or an address outside of the cluster (without)."""

    def __init__(self, name, labels=None, namespace="models", ports=()):
        self.name, self.labels, self.namespace, self.ports = name, labels, namespace, ports

    def is_one_of(self, peers, release_namespace="models"):
        if not peers:
            return True
        for peer in peers:
            if "ipBlock" in peer:
                # The addresses outside are in no block that the cases name.
                continue
            if self.labels is None:
                continue
            namespace = {"kubernetes.io/metadata.name": self.namespace}
            if "namespaceSelector" in peer:
                if not matches(peer["namespaceSelector"], namespace):
                    continue
            elif self.namespace != release_namespace:
                continue
            if matches(peer.get("podSelector", {}), self.labels):
                return True
        return False


def lets(policies, direction, pod, other, port):
    """Whether `pod` may take from, or connect to, `other`."""
    mine = [p["spec"] for p in policies if pod.labels is not None and pod.namespace == "models"
            and direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], pod.labels)]
    if not mine:
        return True
    rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
    side = "from" if direction == "Ingress" else "to"
    return any(other.is_one_of(rule.get(side)) and
               ("ports" not in rule or any(p["port"] == port for p in rule["ports"])) for rule in rules)


def connects(policies, source, target, port):
    return lets(policies, "Egress", source, target, port) and lets(policies, "Ingress", target, source, port)


def check(manifests, values):
    """Every connection that is needed can be made, and no other."""
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    policy = values.get("networkPolicy", {})
    if not policy.get("enabled", True):
        if policies:
            yield "a NetworkPolicy although networkPolicy.enabled is false"
        return
    ours = {}
    for name, labels, spec in pods(manifests):
        ports = [p["containerPort"] for c in spec["containers"] for p in c.get("ports", [])]
        ours[labels["app.kubernetes.io/component"]] = Peer(name, labels, ports=ports)
    client = Peer("a client", {"emberline-client": "true"})
    prometheus = Peer("Prometheus", {"app": "prometheus"}, "monitoring")
    strangers = [Peer("a stranger", {"app": "x"}), Peer("a client elsewhere", {"emberline-client": "true"}, "other"),
                 Peer("an address outside")]
    data = Peer("the data's namespace", {"app": "x"}, "data") if "etcd" in policy else Peer("the data's address")
    etcd = sorted({int(e.rpartition(":")[2]) for e in values["etcd"]["endpoints"]})
    endpoint = values["artifacts"].get("endpoint", "https://aws:443")
    store = int(endpoint.rpartition(":")[2])

    allowed = set()
    for component, peer in ours.items():
        allowed.add((peer.name, ours["coordinator"].name, 7420))
        if component != "test":
            allowed.add((peer.name, data.name, store))
    allowed |= {(ours["coordinator"].name, data.name, port) for port in etcd}
    if policy.get("clients") != []:
        allowed.add((client.name, ours["coordinator"].name, 7420))
        if "serving" in ours:
            allowed.add((client.name, ours["serving"].name, 7430))
    if policy.get("prometheus") != []:
        allowed |= {(prometheus.name, peer.name, port) for peer in ours.values() for port in peer.ports}

    everybody = [*ours.values(), client, prometheus, *strangers, data]
    every_port = sorted({22, 443, 7420, 7421, 7430, store, *etcd})
    for source in everybody:
        for target in everybody:
            if source not in ours.values() and target not in ours.values():
                continue
            for port in every_port:
                wanted = (source.name, target.name, port) in allowed
                # Where peers are not said, the ports of etcd and of the store are open to anywhere outside.
                if not wanted and source in ours.values() and target not in ours.values() and "etcd" not in policy:
                    if port == store and source.name != ours.get("test", client).name:
                        continue
                    if port in etcd and source is ours["coordinator"]:
                        continue
                if connects(policies, source, target, port) != wanted:
                    yield f"{source.name} {'cannot' if wanted else 'can'} connect to {target.name} at {port}"
