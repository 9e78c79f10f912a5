#!/usr/bin/env python3
"""A scripted stream of requests to a served model, made from the rows of the real data.

Asks for one row after the other, in an order that is always the same, until it gets SIGTERM or Ctrl-C.
Then it says how many requests each version answered, and leaves with 1 if any request failed.
Python's standard library only.
"""

import argparse
import collections
import csv
import http.client
import json
import random
import signal
import sys
import threading
import time

# The columns of the data by the names that the model knows.
COLUMNS = {
    "Type": "type",
    "Air temperature [K]": "air_temperature",
    "Process temperature [K]": "process_temperature",
    "Rotational speed [rpm]": "rotational_speed",
    "Torque [Nm]": "torque",
    "Tool wear [min]": "tool_wear",
}
LABEL = "Machine failure"
SHOWN_FAILURES = 5
LABELS_AT_A_TIME = 256
WITHIN_SECONDS = 10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="host:port of a serving worker")
    parser.add_argument("data", help="the CSV file")
    parser.add_argument("--model", default="predictive-maintenance")
    parser.add_argument("--rate", type=float, default=800, help="requests a second")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--labels", action="store_true", help="tell afterwards what was true")
    parser.add_argument("--late", type=float, default=2, help="seconds from an answer to its label")
    return parser.parse_args()


class Client:
    """A connection that is kept, and opened again after a failure."""

    def __init__(self, address):
        self.address = address
        self.connection = None

    def call(self, method, path, body=None):
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.address, timeout=WITHIN_SECONDS)
            text = None if body is None else json.dumps(body)
            self.connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            content = answer.read()
        except BaseException:
            if self.connection is not None:
                self.connection.close()
            self.connection = None
            raise
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content.decode(errors='replace')}")
        return json.loads(content)


class Stream:
    def __init__(self, options):
        self.options = options
        self.path = f"/v2/models/{options.model}"
        with open(options.data, newline="", encoding="utf-8-sig") as file:
            self.rows = list(csv.DictReader(file))
        random.Random(7).shuffle(self.rows)
        # Each column in the type that the model has it in.
        inputs = Client(options.address).call("GET", self.path)["inputs"]
        self.types = {column["name"]: column["datatype"] for column in inputs}
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.answered = collections.Counter()
        self.failures = []
        self.to_tell = collections.deque()
        self.labels = collections.Counter()

    def inputs(self, row):
        read = {"BYTES": str, "INT64": int, "FP64": float}
        for column, name in COLUMNS.items():
            datatype = self.types[name]
            value = read[datatype](row[column])
            yield {"name": name, "datatype": datatype, "shape": [1], "data": [value]}

    def failed(self, what, error):
        with self.lock:
            self.failures.append(f"{what}: {error}")

    def ask(self, connection):
        """Every n-th request, each at its time; who is late does not hurry."""
        client = Client(self.options.address)
        every = self.options.connections / self.options.rate
        at = time.monotonic() + connection / self.options.rate
        number = connection
        while not self.stop.wait(max(0.0, at - time.monotonic())):
            at = max(at, time.monotonic() - every) + every
            row = self.rows[number % len(self.rows)]
            identity = f"{row['UDI']}-{number}"
            number += self.options.connections
            try:
                body = {"id": identity, "inputs": list(self.inputs(row))}
                answer = client.call("POST", f"{self.path}/infer", body)
                if answer["id"] != identity:
                    raise RuntimeError(f"the answer is for `{answer['id']}`")
            except Exception as error:
                self.failed(f"request {identity}", error)
                continue
            with self.lock:
                self.answered[int(answer["model_version"])] += 1
            if self.options.labels:
                due = time.monotonic() + self.options.late
                self.to_tell.append((due, {"id": identity, "row": 0, "label": row[LABEL]}))

    def tell(self):
        """What turned out to be true."""
        client = Client(self.options.address)
        while not self.stop.wait(0.1):
            labels = []
            while self.to_tell and len(labels) < LABELS_AT_A_TIME and self.to_tell[0][0] <= time.monotonic():
                labels.append(self.to_tell.popleft()[1])
            if not labels:
                continue
            try:
                results = client.call("POST", f"{self.path}/feedback", {"labels": labels})["results"]
            except Exception as error:
                self.failed("feedback", error)
                continue
            self.labels.update(result["result"] for result in results)

    def run(self):
        work = [threading.Thread(target=self.ask, args=(n,)) for n in range(self.options.connections)]
        if self.options.labels:
            work.append(threading.Thread(target=self.tell))
        # Not by a handler: it would ask for a lock that whoever it interrupts may hold.
        ends = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        began = time.monotonic()
        for thread in work:
            thread.start()
        signal.sigwait(ends)
        self.stop.set()
        for thread in work:
            thread.join()
        took = time.monotonic() - began
        total = sum(self.answered.values())
        each = ", ".join(f"version {v}: {n}" for v, n in sorted(self.answered.items()))
        print(f"{total} requests answered in {took:.0f} s ({each or 'none'}); {len(self.failures)} failed")
        if self.options.labels:
            each = ", ".join(f"{n} {result}" for result, n in sorted(self.labels.items()))
            print(f"labels told: {each or 'none'}")
        for failure in self.failures[:SHOWN_FAILURES]:
            print(f"  {failure}")
        return 1 if self.failures or not total else 0


if __name__ == "__main__":
    sys.exit(Stream(arguments()).run())
