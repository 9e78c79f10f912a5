"""Starts what a rendered chart would start, as plain processes: with the arguments and the environment of the
containers, on their ports and by their names, against a real etcd and a real S3 server. check.py runs it in
namespaces of its own (network, mounts, processes), so names and ports collide with nobody's, and nothing of it
outlives it. Prints one line for each fault.

Secrets are directories of the scratch directory, `secrets/NAME/KEY`.

Usage: start.py MANIFESTS.json SCRATCH EMBERLINE S3S_FS
"""

import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import manifests as rules

DEADLINE_SECONDS = 30
KEYS = {"AWS_ACCESS_KEY_ID": "THEKEYOFTHETEST", "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-test"}
WRONG_INPUT = re.compile("^it ends with 2: ")
PIPELINE = "pipeline: hello\nstages:\n  a:\n    kind: exec\n    with: { command: [sh, -c, echo hello] }\n"

file, scratch, binary, s3s_fs = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]


def loopback_up():
    with socket.socket() as s:
        flags = struct.pack("16sh", b"lo", 1)  # IFF_UP
        fcntl.ioctl(s, 0x8914, flags)  # SIOCSIFFLAGS


def name_everybody(names):
    hosts = scratch / "hosts"
    hosts.write_text("127.0.0.1 localhost " + " ".join(sorted(names)) + "\n")
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)


def start(name, *command, **options):
    log = open(scratch / f"{name}.log", "wb")
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options)


def wait_for(what, condition):
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        why = condition()
        if not why:
            return True
        # Wrong input does not become right by waiting.
        if time.monotonic() > end or WRONG_INPUT.search(why):
            print(f"{what}: {why}")
            return False
        time.sleep(0.05)


def listens(port):
    def condition():
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError as e:
            return str(e)
    return condition


def mount_volume(volume, directory):
    directory.mkdir(parents=True)
    if "secret" not in volume:
        return
    secret = scratch / "secrets" / volume["secret"]["secretName"]
    items = volume["secret"].get("items") or [{"key": f.name, "path": f.name} for f in secret.iterdir()]
    for item in items:
        (directory / item["path"]).write_bytes((secret / item["key"]).read_bytes())


class Pod:
    """The one container of a pod, as a process."""

    def __init__(self, name, spec):
        self.name, self.spec, self.process = name, spec, None
        [self.container] = spec["containers"]
        # Volumes are directories of ours.
        directories = {}
        for volume in spec["volumes"]:
            directories[volume["name"]] = scratch / name / volume["name"]
            mount_volume(volume, directories[volume["name"]])
        self.environment = {"PATH": os.environ["PATH"]}
        for key, value in rules.environment(self.container, name).items():
            for mount in self.container["volumeMounts"]:
                value = re.sub(rf"^{mount['mountPath']}(?=/|$)", str(directories[mount["name"]]), value)
            self.environment[key] = KEYS.get(key, value)

    def command(self):
        return [binary, *self.container["args"]]

    def start(self):
        self.process = start(self.name, *self.command(), env=self.environment, cwd=scratch)

    def ready(self):
        if self.process.poll() is not None:
            return f"it has ended with {self.process.returncode}: {self.log()}"
        probe = self.container["readinessProbe"]
        if "exec" in probe:
            done = subprocess.run([binary, *probe["exec"]["command"][1:]], env=self.environment, text=True, capture_output=True)
            said = (done.stderr.strip().splitlines() or ["nothing"])[0]
            return f"it ends with {done.returncode}: {said}" if done.returncode else None
        [(kind, probe)] = [(k, v) for k, v in probe.items() if k in ("httpGet", "tcpSocket")]
        [port] = [p["containerPort"] for p in self.container["ports"] if p["name"] == probe["port"]]
        if kind == "tcpSocket":
            return listens(port)()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{probe['path']}", timeout=5).close()
        except OSError as e:
            return str(e)

    def log(self):
        return (scratch / f"{self.name}.log").read_text(errors="replace").strip()[-500:]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        grace = self.spec.get("terminationGracePeriodSeconds", 30)
        try:
            code = self.process.wait(min(grace, DEADLINE_SECONDS))
        except subprocess.TimeoutExpired:
            print(f"{self.name}: does not end on SIGTERM")
            return
        if code:
            print(f"{self.name}: ends with {code} on SIGTERM: {self.log()}")


def main():
    all_manifests = json.loads(Path(file).read_text())
    pods = {}
    for name, labels, spec in rules.pods(all_manifests):
        component = labels["app.kubernetes.io/component"]
        pods[component] = Pod(name if component == "test" else name + "-0", spec)
    names = set(re.findall(r"[a-z0-9.-]+\.svc\b", json.dumps([p.environment for p in pods.values()])))
    loopback_up()
    name_everybody(names)

    server, client = scratch / "secrets/etcd-server", scratch / "secrets/etcd-client"
    start("etcd", "etcd", "--data-dir", scratch / "etcd", "--client-cert-auth",
          "--listen-client-urls", "https://127.0.0.1:2379", "--advertise-client-urls", "https://etcd.data.svc:2379",
          "--trusted-ca-file", client / "ca.crt", "--cert-file", server / "tls.crt", "--key-file", server / "tls.key")
    (scratch / "s3/models").mkdir(parents=True)
    start("s3", s3s_fs, "--host", "127.0.0.1", "--port", "9000", "--access-key", KEYS["AWS_ACCESS_KEY_ID"],
          "--secret-key", KEYS["AWS_SECRET_ACCESS_KEY"], scratch / "s3")
    if not (wait_for("etcd", listens(2379)) and wait_for("the S3 server", listens(9000))):
        return
    coordinator, test = pods["coordinator"], pods["test"]
    coordinator.start()
    if not wait_for(coordinator.name, coordinator.ready):
        return
    # Both have their metrics at the same port, so one goes before the other comes.
    for component in ("worker", "serving"):
        pods[component].start()
        wait_for(pods[component].name, pods[component].ready)
        (scratch / "hello.yaml").write_text(PIPELINE)
        for words in (test.container["args"], ["run", str(scratch / "hello.yaml"), "--no-cache"]):
            try:
                done = subprocess.run([binary, *words], env=test.environment, cwd=scratch, text=True,
                                      capture_output=True, timeout=DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"with {component}: `emberline {words[0]}` does not end: {pods[component].log()}")
                continue
            if done.returncode or (words[0] == "cluster" and coordinator.environment["EMBERLINE_ADVERTISE"] not in done.stdout):
                print(f"with {component}: `emberline {words[0]}` ends with {done.returncode}: {done.stdout}{done.stderr}")
        pods[component].stop()
    if not any(p.is_file() for p in (scratch / "s3/models").rglob("*")):
        print("nothing is in the bucket")
    coordinator.stop()


main()
