"""An independent reader of bundles: it knows docs/guide/models.md and nothing of burn.

It checks the list of digests, predicts the rows of a CSV file from `weights.safetensors` and
`preprocessing.json`, and prints the probabilities (or values), row after row, as JSON.
"""

import csv
import hashlib
import json
import math
import sys
import tarfile

import numpy as np
from safetensors.numpy import load

NAMES = ["bundle.json", "model.json", "weights.bpk", "weights.safetensors", "schema.json",
         "preprocessing.json"]


def read(path: str) -> dict[str, bytes]:
    """The files of a bundle, by name."""
    with tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == NAMES, members
        for member in members:
            assert member.isreg() and member.mtime == 0 and member.uid == 0, member
        files = {m.name: archive.extractfile(m).read() for m in members}
    listed = json.loads(files["bundle.json"])["files"]
    assert [f["name"] for f in listed] == NAMES[1:], listed
    for file in listed:
        content = files[file["name"]]
        assert len(content) == file["bytes"], file
        assert hashlib.sha256(content).hexdigest() == file["sha256"], file
    return files


def inputs(columns: list[dict], rows: list[dict[str, str]]) -> np.ndarray:
    """Rows as numbers: what the network takes."""
    names = rows[0].keys()

    def numbers(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    out = []
    for column in columns:
        match column["type"]:
            case "standardised":
                values = numbers(column["column"])
            case "derived":
                known = {n: numbers(n) for n in names if n in column["expression"]}
                values = eval(column["expression"], {"__builtins__": {}}, known)
            case "one_hot":
                out += [[row[column["column"]] == c for row in rows] for c in column["categories"]]
                continue
        out.append((values - column["mean"]) / column["deviation"])
    return np.array(out, dtype=np.float64).T.astype(np.float32)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def forward(network: dict, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A multi-layer perceptron, in double precision."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for layer in range(len(network["hidden"])):
        x = x @ tensors[f"hidden.{layer}.weight"] + tensors[f"hidden.{layer}.bias"]
        if network["batch_norm"]:
            norm = {n: tensors[f"norms.{layer}.{n}"]
                    for n in ("gamma", "beta", "running_mean", "running_var")}
            scale = norm["gamma"] / np.sqrt(norm["running_var"] + 1e-5)
            x = (x - norm["running_mean"]) * scale + norm["beta"]
        x = ACTIVATIONS[network["activation"]](x)
    return x @ tensors["output.weight"] + tensors["output.bias"]


def main(bundle: str, table: str) -> None:
    files = read(bundle)
    preprocessing = json.loads(files["preprocessing.json"])
    network = json.loads(files["model.json"])["network"]
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    x = inputs(preprocessing["features"]["columns"], rows)
    y = forward(network, load(files["weights.safetensors"]), x.astype(np.float64))
    label = preprocessing["label"]
    if label["type"] == "classes":
        powers = np.exp(y - y.max(axis=1, keepdims=True))
        y = powers / powers.sum(axis=1, keepdims=True)
    else:
        y = y * label["deviation"] + label["mean"]
    json.dump(y.tolist(), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
