"""The work of check.sh; see there."""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

import manifests as rules
import policies

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHART = ROOT / "deploy/helm/emberline"
# The oldest that Chart.yaml allows, and the newest that there are schemas of.
KUBERNETES = ["1.27", "1.37"]
CUSTOM = {"cert-manager.io/v1": "v1", "keda.sh/v1alpha1": "v1alpha1", "monitoring.coreos.com/v1": "v1"}
# What Helm says of a chart that has no picture.
LINT_NOISE = "icon is recommended"
COPIES = {"deploy/prometheus/alerts.yml": "files/alerts.yml", "deploy/grafana/dashboards": "files/dashboards"}

NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Faults that are known, by how they begin to differ from what is asked: each goes when what it names is there.
PENDING = [line for line in (HERE / "pending.txt").read_text().splitlines() if line and line[0] != "#"]

tools, binary = Path(sys.argv[1]), sys.argv[2]
passed, failed = 0, 0
met = set()


def tell(what, faults):
    global passed, failed
    known, faults = [], list(faults)
    for fault in faults:
        known += [fault for pending in PENDING if pending in str(fault)]
        met.update(pending for pending in PENDING if pending in str(fault))
    faults = [fault for fault in faults if fault not in known]
    passed, failed = passed + (not faults), failed + bool(faults)
    print(f"{'FAIL' if faults else 'ok  '}  {what}", flush=True)
    for fault in faults:
        print("      " + str(fault).rstrip().replace("\n", "\n      "), flush=True)


def helm(version, *arguments):
    # Nothing of the user's own helm counts.
    home = tempfile.gettempdir()
    environment = {"PATH": os.environ["PATH"], "HOME": home, "KUBECONFIG": "/dev/null"}
    return subprocess.run([tools / f"helm{version}", *arguments], env=environment, stdin=subprocess.DEVNULL,
                          text=True, capture_output=True)


def template(version, *arguments):
    # Helm 4 would ask a cluster otherwise.
    return helm(version, "template", "run", str(CHART), "--namespace", "models", *arguments)


def parsed(text):
    return [m for m in yaml.safe_load_all(text) if m]


def schema_faults(manifest, custom):
    kind, api = manifest["kind"], manifest["apiVersion"]
    where = f"{kind} {manifest['metadata']['name']}"
    if api in CUSTOM:
        errors = custom[f"{kind.lower()}_{CUSTOM[api]}"].iter_errors(manifest)
        return [f"{where}: {e.json_path}: {e.message}" for e in errors]
    out = []
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as e:
            out.append(f"{where}: Kubernetes {version}: {'.'.join(map(str, e.path))}: {e.message}")
    return out


class Help:
    """What `emberline COMMAND --help` names."""

    def __init__(self, *command):
        self.command = command
        done = subprocess.run([binary, *command, "--help"], text=True, capture_output=True)
        self.there = done.returncode == 0
        self.flags = set(re.findall(r"^ +(?:-\w, )?(--[a-z0-9-]+)", done.stdout, re.M))
        # Each variable with the flag that it stands for.
        self.variables = {}
        for block in re.split(r"\n\n(?= +-)|\n(?= +-{1,2}\w)", done.stdout):
            name, variable = re.search(r"(--[a-z0-9-]+)", block), re.search(r"\[env: (EMBERLINE_\w+)", block)
            if name and variable:
                self.variables[variable[1]] = name[1]


def command_faults(all_manifests):
    """Flags, variables and their values are what the binary takes."""
    helps, seen = {}, set()
    for name, _, spec in rules.pods(all_manifests):
        for container in spec["containers"]:
            words = [a for a in container["args"] if not a.startswith("-")]
            flags = [a for a in container["args"] if a.startswith("-")]
            # The image's own entry point is tini: it takes up the orphans of stages.
            if "command" in container:
                yield f"{name}: runs {container['command']}"
            known = helps.setdefault(tuple(words), Help(*words))
            variables = rules.environment(container, name + "-0")
            ours = {key: value for key, value in variables.items() if key.startswith("EMBERLINE_")}
            for key in ours:
                if key not in known.variables and key != "EMBERLINE_NAME":
                    yield f"{name}: `emberline {' '.join(words)}` knows no {key}"
            given = [f"{known.variables[key]}={value}" for key, value in ours.items() if key in known.variables]
            if tuple(words + flags + given) in seen:
                continue
            seen.add(tuple(words + flags + given))
            # clap reads what stands before `--help`, and refuses what it cannot.
            done = subprocess.run([binary, *words, *flags, *given, "--help"], text=True, capture_output=True)
            if done.returncode != 0:
                yield f"{name}: {done.stderr.strip().splitlines()[0]}"
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                command = container.get(probe, {}).get("exec", {}).get("command")
                if not command:
                    continue
                if command[0] != "/usr/bin/emberline":
                    yield f"{name}: {probe}: {command[0]}"
                done = subprocess.run([binary, *command[1:], "--help"], text=True, capture_output=True)
                port = int(command[-1].rpartition(":")[2])
                if done.returncode != 0:
                    yield f"{name}: {probe}: {done.stderr.strip().splitlines()[0]}"
                if port not in [p["containerPort"] for p in container["ports"]]:
                    yield f"{name}: {probe}: it does not listen at {port}"


def metric_faults(texts):
    """Metrics that are asked for are in the guide, by the names that Prometheus has for them."""
    told = (ROOT / "docs/guide/telemetry.md").read_text(encoding="utf-8").replace(".", "_")
    for text in texts:
        for name in set(re.findall(r"\b(?:cicd|emberline)_[a-z_]+(?=\{)", text)):
            if f"`{name}`" not in told:
                yield f"no metric {name} is in docs/guide/telemetry.md"


def copy_faults():
    for source, copy in COPIES.items():
        source, copy = ROOT / source, CHART / copy
        if not source.exists():
            yield f"{source.relative_to(ROOT)} is not there"
            continue
        pairs = [(source, copy)]
        if source.is_dir():
            pairs = [(file, copy / file.name) for file in sorted(source.glob("*.json"))]
            extra = {file.name for file in copy.glob("*")} - {file.name for file, _ in pairs}
            if extra:
                yield f"{copy.relative_to(ROOT)}: {sorted(extra)} are not in {source.relative_to(ROOT)}"
        for file, mine in pairs:
            if not mine.exists() or file.read_bytes() != mine.read_bytes():
                yield f"not equal: cp {file.relative_to(ROOT)} {mine.relative_to(ROOT)}"


def make_secret(directory, authority, host):
    """A certificate as cert-manager keeps it: `ca.crt`, `tls.crt`, `tls.key`."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    directory.mkdir(parents=True)
    if not authority.exists():
        authority.mkdir()
        openssl("req", "-x509", *key, "-subj", "/CN=authority", "-keyout", authority / "key", "-out", authority / "ca.crt")
    openssl("req", "-x509", *key, "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
            "-addext", "basicConstraints=critical,CA:FALSE", "-CA", authority / "ca.crt", "-CAkey", authority / "key",
            "-keyout", "tls.key", "-out", "tls.crt")
    (directory / "ca.crt").write_bytes((authority / "ca.crt").read_bytes())


def start_faults(directory):
    """What the chart starts does start, and works: start.py."""
    values = merged(yaml.safe_load((HERE / "cases/insecure.yaml").read_text()), {
        "coordinators": {"replicas": 1}, "serving": {"enabled": True},
        "etcd": {"endpoints": ["https://etcd.data.svc:2379"], "tlsSecret": "etcd-client"}})
    scratch = Path(directory) / "start"
    for name in ("etcd-client", "etcd-server"):
        make_secret(scratch / "secrets" / name, Path(directory) / "authority", "etcd.data.svc")
    (scratch / "values.yaml").write_text(yaml.safe_dump(values))
    made = parsed(template(4, "-f", str(scratch / "values.yaml")).stdout)
    (scratch / "manifests.json").write_text(json.dumps(made))
    s3s_fs = tools.parent / "bin/s3s-fs"
    done = subprocess.run([*NAMESPACES, sys.executable, HERE / "start.py", scratch / "manifests.json", scratch, binary, s3s_fs],
                          text=True, capture_output=True)
    return (done.stdout + done.stderr).splitlines()


def notes(case):
    """What a user is told after the installation. (`helm template` leaves it out, helm 3 asks a cluster.)"""
    done = helm(4, "install", "run", str(CHART), "--dry-run=client", "-f", str(HERE / "cases" / f"{case}.yaml"))
    if done.returncode != 0:
        raise SystemExit(f"no notes of {case}: {done.stderr}")
    return done.stdout.partition("\nNOTES:\n")[2]


def note_faults():
    expected = {
        "insecure": {"WARNING: insecure=true.", "WARNING: artifacts.endpoint is plain http"},
        "hpa": {"WARNING: insecure=true.", "WARNING: networkPolicy.enabled=false"},
        "shut": set(),
    }
    for case, warnings in expected.items():
        text = notes(case)
        found = {w for w in warnings if w in text}
        if found != warnings or text.count("WARNING") != len(warnings):
            yield f"{case}: not {sorted(warnings)}:\n{text}"


def merged(a, b):
    return {**a, **{k: merged(a.get(k, {}), v) if isinstance(v, dict) else v for k, v in b.items()}}


def wrong(number, case, directory):
    """Faults of how both helms refuse a case: one clear line."""
    values = case["values"]
    if "base" in case:
        values = merged(yaml.safe_load((HERE / "cases" / f"{case['base']}.yaml").read_text()), values)
    file = Path(directory) / f"{number}.yaml"
    file.write_text(yaml.safe_dump(values))
    for version in (4, 3):
        says = case.get("helm3", case["says"]) if version == 3 else case["says"]
        done = template(version, "-f", str(file))
        lines = [line for line in done.stderr.splitlines() if says in line]
        if done.returncode == 0:
            yield f"helm {version} takes it"
        elif len(lines) != 1:
            yield f"helm {version} says:\n{done.stderr}"


def guide(directory):
    """The values that the guide gives, as a case; and the rule of an adapter that it gives."""
    text = (ROOT / "docs/guide/kubernetes.md").read_text(encoding="utf-8")
    install, gpus, rule = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S))
    file = Path(directory) / "guide.yaml"
    file.write_text(yaml.safe_dump(merged(install, gpus)))
    return file, rule


def main():
    with tempfile.TemporaryDirectory() as directory:
        return checked(directory)


def checked(directory):
    custom = {f.stem: jsonschema.Draft7Validator(json.loads(f.read_text())) for f in HERE.glob("schemas/*.json")}
    guide_case, rule = guide(directory)
    unique = {}
    for case in [*sorted(HERE.glob("cases/*.yaml")), guide_case]:
        values = yaml.safe_load(case.read_text())
        lint = [helm(v, "lint", "--strict", str(CHART), "-f", str(case)) for v in (3, 4)]
        noise = [line for run in lint for line in run.stdout.splitlines() if line.startswith("[") and LINT_NOISE not in line]
        tell(f"{case.stem}: lint", noise + [run.stdout + run.stderr for run in lint if run.returncode != 0])
        done = {v: template(v, "-f", str(case)) for v in (3, 4)}
        failures = [run.stderr for run in done.values() if run.returncode != 0]
        if failures:
            tell(f"{case.stem}: render", failures)
            continue
        made = {v: parsed(run.stdout) for v, run in done.items()}
        key = lambda m: (m["kind"], m["metadata"]["name"])
        same = sorted(made[3], key=key) == sorted(made[4], key=key)
        tell(f"{case.stem}: helm 3 and 4 render the same", [] if same else ["they do not"])
        for m in made[4]:
            unique[json.dumps(m, sort_keys=True, default=str)] = m
        for check in rules.CHECKS:
            tell(f"{case.stem}: {check.__name__}", check(made[4], values))
        tell(f"{case.stem}: network policies", policies.check(made[4], values))
        tell(f"{case.stem}: flags and variables", command_faults(made[4]))
        tell(f"{case.stem}: metrics", metric_faults([json.dumps(m) for m in made[4] if m["kind"] == "ScaledObject"]))
    kinds = sorted({m["kind"] for m in unique.values()})
    tell(f"{len(unique)} manifests fit the schemas: {', '.join(kinds)}",
         [fault for m in unique.values() for fault in schema_faults(m, custom)])
    tell("guide: metrics of the rule", metric_faults([json.dumps(rule)]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        refused = yaml.safe_load((HERE / "wrong.yaml").read_text())
        results = pool.map(lambda pair: list(wrong(*pair, directory)), enumerate(refused))
        for case, faults in zip(refused, results):
            tell(f"refused: {case['says']}", faults)
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode == 0:
        tell("what it starts starts, answers, runs a pipeline and ends", start_faults(directory))
    else:
        print("NOT CHECKED: that what it starts works, for that takes namespaces, which this user cannot make")
    tell("the notes warn of what is insecure", note_faults())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    tell("appVersion is the release's", [] if chart["appVersion"] == version else [f"{chart['appVersion']}, not {version}"])
    tell("alerts and dashboards are equal to their copies in the chart", copy_faults())
    tell("what is pending is still missing", [f"pending.txt: take out `{line}`" for line in PENDING if line not in met])
    print(f"{passed} passed, {failed} failed")
    return failed != 0


sys.exit(main())
