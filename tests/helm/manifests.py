"""What rendered manifests must keep, beyond the schemas. Each check yields one line for each fault."""

import re

WORKLOADS = {"Deployment", "StatefulSet"}
# What selects pods for good: a Deployment's selector cannot be changed later.
SELECTORS = {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
# The least that is left after the drain to checkpoint, store and hand over, in seconds.
MARGIN = 30


def workloads(manifests):
    return [m for m in manifests if m["kind"] in WORKLOADS]


def pods(manifests):
    """(what has it, labels, spec) of each pod template and pod."""
    for m in manifests:
        if m["kind"] in WORKLOADS:
            yield m["metadata"]["name"], m["spec"]["template"]["metadata"]["labels"], m["spec"]["template"]["spec"]
        elif m["kind"] == "Pod":
            yield m["metadata"]["name"], m["metadata"]["labels"], m["spec"]


def matches(selector, labels):
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise ValueError(f"the operator {expression['operator']} is not known here")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def selected(selector, manifests):
    return [pod for pod in pods(manifests) if matches(selector, pod[1])]


def port_names(spec):
    return {p["name"] for c in spec["containers"] for p in c.get("ports", [])}


def seconds(text):
    units = {"s": 1, "m": 60, "h": 3600}
    parts = re.findall(r"(\d+)([smh])", text)
    return sum(int(number) * units[unit] for number, unit in parts)


def flag(container, name):
    values = [a.split("=", 1)[1] for a in container.get("args", []) if a.startswith(name + "=")]
    return values[0] if values else None


def environment(container, pod):
    """What the container's environment will be, for a pod of that name."""
    out = {}
    for variable in container.get("env", []):
        value = variable.get("value", "")
        if "fieldRef" in variable.get("valueFrom", {}):
            value = pod
        out[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m: out.get(m[1], m[0]), value)
    return out


def names(manifests, _values):
    """No two of a kind have the same name, and every name is one."""
    seen = set()
    for m in manifests:
        key = (m["kind"], m["metadata"]["name"])
        if key in seen:
            yield f"{key}: twice"
        seen.add(key)
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", key[1]):
            yield f"{key}: no name for it"


def selectors(manifests, _values):
    """Selectors find the pods that they are for, and only those."""
    for m in manifests:
        kind, name, spec = m["kind"], m["metadata"]["name"], m.get("spec", {})
        if kind in WORKLOADS:
            selector, labels = spec["selector"], spec["template"]["metadata"]["labels"]
            if set(selector["matchLabels"]) != SELECTORS:
                yield f"{kind} {name}: selects by {sorted(selector['matchLabels'])}"
            if not matches(selector, labels):
                yield f"{kind} {name}: does not select its own pods"
            if len(selected(selector, manifests)) != 1:
                yield f"{kind} {name}: selects pods of others, too"
            if labels.keys() - SELECTORS:
                yield f"{kind} {name}: a change of {sorted(labels.keys() - SELECTORS)} restarts its pods"
            for constraint in spec["template"]["spec"].get("topologySpreadConstraints", []):
                if not matches(constraint["labelSelector"], labels):
                    yield f"{kind} {name}: spreads the pods of others"
        elif kind == "Service":
            found = selected({"matchLabels": spec["selector"]}, manifests)
            if len(found) != 1:
                yield f"Service {name}: selects {[pod[0] for pod in found]}"
            for port in spec["ports"]:
                if any(port["targetPort"] not in port_names(pod[2]) for pod in found):
                    yield f"Service {name}: its pods have no port {port['targetPort']}"
        elif kind == "PodDisruptionBudget":
            if len(selected(spec["selector"], manifests)) != 1:
                yield f"PodDisruptionBudget {name}: not of one workload"
        elif kind == "PodMonitor":
            found = selected(spec["selector"], manifests)
            wanted = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
            if not found or any(wanted - port_names(pod[2]) for pod in found):
                yield f"PodMonitor {name}: {sorted(wanted)} of {[pod[0] for pod in found]}"
        elif kind == "ServiceMonitor":
            found = [s for s in manifests if s["kind"] == "Service" and matches(spec["selector"], s["metadata"]["labels"])]
            if len(found) != 1:
                yield f"ServiceMonitor {name}: selects {[s['metadata']['name'] for s in found]}"
            for service in found:
                missing = {e["port"] for e in spec["endpoints"]} - {p["name"] for p in service["spec"]["ports"]}
                if missing:
                    yield f"ServiceMonitor {name}: no port {sorted(missing)}"
    services = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Service"}
    for m in manifests:
        if m["kind"] == "StatefulSet":
            service = services.get(m["spec"]["serviceName"])
            if not service or service["spec"].get("clusterIP") != "None":
                yield f"StatefulSet {m['metadata']['name']}: its serviceName is no headless Service"
        if m["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"):
            target = m["spec"]["scaleTargetRef"]["name"]
            [deployment] = [d for d in manifests if d["kind"] == "Deployment" and d["metadata"]["name"] == target]
            if "replicas" in deployment["spec"]:
                yield f"{m['kind']}: {target} says its replicas itself, and each upgrade would undo the scaling"


def accounts(manifests, _values):
    there = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ServiceAccount"}
    used = set()
    for name, _, spec in pods(manifests):
        used.add(spec["serviceAccountName"])
        if spec["serviceAccountName"] not in there:
            yield f"{name}: no ServiceAccount {spec['serviceAccountName']}"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: mounts a token of Kubernetes' API"
    for name in there.keys() - used:
        yield f"ServiceAccount {name}: nobody's"
    for name, account in there.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {name}: mounts its token"


def texts(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def references(value, path=()):
    """(field, name) of every Secret and ConfigMap that is referred to."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "secretName":
                yield path + (key,), item
            elif key in ("secretKeyRef", "configMapKeyRef", "secretRef", "configMapRef", "keySecret", "secret",
                         "configMap", "credentials") and isinstance(item, dict) and "name" in item:
                yield path + (key,), item["name"]
            else:
                yield from references(item, path + (key,))
    elif isinstance(value, list):
        for item in value:
            yield from references(item, path)


def secrets(manifests, values):
    """Secrets are only those that the values name, or that cert-manager makes; none is in the chart."""
    known = set(texts(values))
    known |= {m["spec"]["secretName"] for m in manifests if m["kind"] == "Certificate"}
    for m in manifests:
        if m["kind"] == "Secret":
            yield f"Secret {m['metadata']['name']}: a secret in a release"
        for field, name in references(m):
            if not name or name not in known:
                yield f"{m['kind']} {m['metadata']['name']}: nobody makes `{name}` of {'.'.join(field)}"


def volumes(manifests, _values):
    for m in manifests:
        if m["kind"] in WORKLOADS:
            spec, name = m["spec"]["template"]["spec"], m["metadata"]["name"]
            claims = [c["metadata"]["name"] for c in m["spec"].get("volumeClaimTemplates", [])]
        elif m["kind"] == "Pod":
            spec, name, claims = m["spec"], m["metadata"]["name"], []
        else:
            continue
        there = [v["name"] for v in spec.get("volumes", [])] + claims
        if len(there) != len(set(there)):
            yield f"{name}: two volumes of one name"
        mounts = [v for c in spec["containers"] for v in c.get("volumeMounts", [])]
        if {v["name"] for v in mounts} != set(there):
            yield f"{name}: volumes {sorted(there)}, mounted {sorted(v['name'] for v in mounts)}"
        paths = [v["mountPath"] for v in mounts]
        if len(paths) != len(set(paths)):
            yield f"{name}: two volumes at one path"
        if any(v["secret"].get("defaultMode") != 0o440 for v in spec["volumes"] if "secret" in v):
            yield f"{name}: a secret that others may read"
        if any("subPath" in v for v in mounts):
            yield f"{name}: what is mounted by subPath is never renewed"
        # Whatever is said to be a file of ours must lie in a volume.
        for container in spec["containers"]:
            for variable, value in environment(container, "pod").items():
                if value.startswith("/") and not any(value == p or value.startswith(p + "/") for p in paths):
                    yield f"{name}: {variable}={value} lies in no volume"


def restricted(manifests, _values):
    """Kubernetes' Pod Security Standard `restricted`, and a root file system that is read-only."""
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for name, _, spec in pods(manifests):
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            yield f"{name}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name}: shares namespaces with the host"
        for volume in spec.get("volumes", []):
            if set(volume) - {"name"} - allowed:
                yield f"{name}: a volume {sorted(set(volume) - {'name'})}"
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
                yield f"{name}: may gain privileges"
            if context.get("readOnlyRootFilesystem") is not True:
                yield f"{name}: its root file system can be written"
            if context.get("capabilities", {}).get("drop") != ["ALL"] or context["capabilities"].get("add"):
                yield f"{name}: keeps capabilities"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{name}: a port of the host"


def images(manifests, _values):
    for name, _, spec in pods(manifests):
        for container in spec["containers"]:
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            if not tag or tag == "latest":
                yield f"{name}: the image {container['image']} names no version"


def resources(manifests, _values):
    """Every container says what it needs, and a worker gives tasks no more than it has."""
    units = {"Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

    def size(text):
        number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", text).groups()
        return int(number) * units[unit]

    for name, _, spec in pods(manifests):
        for container in spec["containers"]:
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            if not {"cpu", "memory"} <= asked.keys() or "memory" not in most:
                yield f"{name}: says not what it needs"
            if container["args"][0] != "worker":
                continue
            if size(flag(container, "--memory")) >= size(most["memory"]):
                yield f"{name}: gives tasks all of its memory"
            if float(flag(container, "--cpu")) != float(asked["cpu"]):
                yield f"{name}: gives tasks other CPUs than it asks for"
            gpus = sum(int(value) for key, value in most.items() if key.endswith("/gpu"))
            if gpus != int(flag(container, "--gpus")):
                yield f"{name}: gives tasks {flag(container, '--gpus')} GPUs and has {gpus}"


def graces(manifests, _values):
    """A worker is not killed before it has drained."""
    for name, _, spec in pods(manifests):
        for container in spec["containers"]:
            drain = flag(container, "--drain-timeout")
            if container["args"][0] == "worker" and drain is None:
                yield f"{name}: no --drain-timeout"
            if drain is not None and spec["terminationGracePeriodSeconds"] < seconds(drain) + MARGIN:
                yield f"{name}: is killed after {spec['terminationGracePeriodSeconds']} s, and drains for {drain}"


def rollouts(manifests, _values):
    """An upgrade comes to its end: it needs no GPU that nobody has, and does not give up on a drain."""
    for m in manifests:
        if m["kind"] != "Deployment":
            continue
        name, spec = m["metadata"]["name"], m["spec"]["template"]["spec"]
        most = spec["containers"][0]["resources"]["limits"]
        if any(key.endswith("/gpu") for key in most) and m["spec"]["strategy"]["rollingUpdate"]["maxSurge"] != 0:
            yield f"{name}: an upgrade needs more GPUs than there are"
        if m["spec"]["progressDeadlineSeconds"] <= spec["terminationGracePeriodSeconds"]:
            yield f"{name}: an upgrade is given up while a worker drains"


def addresses(manifests, _values):
    """Names that are told to others exist: of pods by their headless Service, and of the release's namespace."""
    sets = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "StatefulSet"}
    reached = set()
    for s in sets.values():
        for number in range(s["spec"]["replicas"]):
            pod = f"{s['metadata']['name']}-{number}"
            host = f"{pod}.{s['spec']['serviceName']}.models.svc"
            ports = {str(p["containerPort"]) for c in s["spec"]["template"]["spec"]["containers"] for p in c["ports"]}
            reached |= {f"{host}:{port}" for port in ports}
            for container in s["spec"]["template"]["spec"]["containers"]:
                for variable, value in environment(container, pod).items():
                    if variable.endswith("_ADVERTISE") and value.rpartition(":")[0] != host:
                        yield f"{pod}: {variable}={value} is not itself"
    for name, _, spec in pods(manifests):
        for container in spec["containers"]:
            server = environment(container, name + "-0").get("EMBERLINE_SERVER")
            for address in (server or "").split(",") if server is not None else []:
                if address not in reached:
                    yield f"{name}: nobody is at {address}"


def certificates(manifests, _values):
    """A certificate of cert-manager has every name by which its holder is reached."""
    made = {m["spec"]["secretName"]: m["spec"] for m in manifests if m["kind"] == "Certificate"}
    if not made:
        return

    def covers(spec, host):
        return any(host == n or (n.startswith("*.") and host.partition(".")[2] == n[2:]) for n in spec["dnsNames"])

    holders = {}
    for m in workloads(manifests):
        spec = m["spec"]["template"]["spec"]
        [secret] = [v["secret"]["secretName"] for v in spec["volumes"] if v["name"] == "tls"]
        name, labels = m["metadata"]["name"], m["spec"]["template"]["metadata"]["labels"]
        holders[name] = (labels, made[secret])
        wanted = ["localhost"]
        for container in spec["containers"]:
            wanted += [value.rpartition(":")[0] for key, value in environment(container, name + "-0").items()
                       if key.endswith("_ADVERTISE")]
        wanted += [f"{s['metadata']['name']}.models.svc" for s in manifests if s["kind"] == "Service"
                   and s["spec"].get("clusterIP") != "None" and matches({"matchLabels": s["spec"]["selector"]}, labels)]
        for host in wanted:
            if not covers(made[secret], host):
                yield f"{name}: its certificate does not name {host}"
        if set(made[secret]["usages"]) != {"server auth", "client auth"}:
            yield f"{name}: a certificate for {made[secret]['usages']}"
    for m in manifests:
        endpoints = m.get("spec", {}).get("podMetricsEndpoints") or m.get("spec", {}).get("endpoints") or []
        for endpoint in endpoints:
            for labels, certificate in holders.values():
                chosen = {k: v for k, v in m["spec"]["selector"].items()}
                chosen["matchLabels"] = {k: v for k, v in chosen.get("matchLabels", {}).items() if k in SELECTORS}
                if matches(chosen, labels) and not covers(certificate, endpoint["tlsConfig"]["serverName"]):
                    yield f"{m['kind']} {m['metadata']['name']}: {endpoint['tlsConfig']['serverName']} is not its name"


def scaling(manifests, _values):
    """What KEDA's Prometheus trigger is told; the schema of a ScaledObject takes any words there."""
    known = {"serverAddress", "query", "threshold", "ignoreNullValues"}
    for m in manifests:
        if m["kind"] != "ScaledObject":
            continue
        [trigger] = m["spec"]["triggers"]
        if set(trigger["metadata"]) != known or any(not isinstance(v, str) for v in trigger["metadata"].values()):
            yield f"ScaledObject {m['metadata']['name']}: a trigger with {trigger['metadata']}"
        query = trigger["metadata"].get("query", "")
        if any(query.count(a) != query.count(b) for a, b in ("()", "{}")):
            yield f"ScaledObject {m['metadata']['name']}: no query: {query}"


CHECKS = [names, selectors, scaling, accounts, secrets, volumes, restricted, images, resources, graces, rollouts, addresses, certificates]
