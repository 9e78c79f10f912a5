"""Trains gradient boosting on the AI4I CSV and writes the model and its metrics as JSON.

In: the directory $EMBERLINE_INPUT_DATA with one CSV file. Out: `model.json` (the trees, so that no
pickle has to be trusted) and `metrics.json` in $EMBERLINE_OUTPUT_MODEL; the metrics also go to
$EMBERLINE_RESULTS, where the pipeline's conditions can see them.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import sys

BAD_DATA = 65  # EX_DATAERR; listed under `data_exit_codes` in pipeline.yaml

LABEL = "Machine failure"
NUMBERS = [
    "Air temperature [K]",
    "Process temperature [K]",
    "Rotational speed [rpm]",
    "Torque [Nm]",
    "Tool wear [min]",
]
TYPES = ["L", "M", "H"]


def fail(code, message):
    """Ends the script; the last line that it prints becomes the error of the stage."""
    print(message, file=sys.stderr)
    sys.exit(code)


def bad_data(message):
    fail(BAD_DATA, message)


def read_rows(directory):
    """The features and labels of the only CSV file in a directory."""
    files = sorted(pathlib.Path(directory).glob("*.csv"))
    if len(files) != 1:
        bad_data(f"the input has {len(files)} CSV files, one is expected")
    rows, labels = [], []
    with files[0].open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        wanted = ["Type", *NUMBERS, LABEL]
        missing = [name for name in wanted if name not in (reader.fieldnames or [])]
        if missing:
            bad_data(f"{files[0].name} has no column {', '.join(missing)}")
        for row in reader:
            where = f"{files[0].name}, line {reader.line_num}"
            if row["Type"] not in TYPES or row[LABEL] not in ("0", "1"):
                bad_data(f"{where}: unknown type {row['Type']!r} or label {row[LABEL]!r}")
            try:
                numbers = [float(row[name]) for name in NUMBERS]
            except (TypeError, ValueError):
                bad_data(f"{where}: a column that is to be a number is none")
            if not all(map(math.isfinite, numbers)):
                bad_data(f"{where}: a number is not finite")
            air, process, speed, torque, wear = numbers
            derived = [process - air, torque * speed, torque * wear]
            rows.append([TYPES.index(row["Type"]), *numbers, *derived])
            labels.append(int(row[LABEL]))
    if min(labels.count(0), labels.count(1)) < 10:
        bad_data(f"{len(labels)} rows, {sum(labels)} of them failures: too few to learn from")
    return rows, labels


def as_json(model):
    """The model as plain numbers: log odds = `base` + `learning_rate` × the sum of the leaves."""

    def tree(t):
        return {
            "feature": t.feature.tolist(),
            "threshold": t.threshold.tolist(),
            "left": t.children_left.tolist(),
            "right": t.children_right.tolist(),
            "value": t.value[:, 0, 0].tolist(),
        }

    positive = float(model.init_.class_prior_[1])
    return {
        "model": "gradient_boosting",
        "features": ["Type", *NUMBERS, "warming", "power", "strain"],
        "types": TYPES,
        "base": math.log(positive / (1.0 - positive)),
        "learning_rate": model.learning_rate,
        "trees": [tree(stage[0].tree_) for stage in model.estimators_],
    }


def predict(document, row):
    """The probability of a failure, from the JSON alone; the row is of single precision."""
    odds = document["base"]
    for tree in document["trees"]:
        node = 0
        while tree["left"][node] >= 0:
            goes_left = row[tree["feature"][node]] <= tree["threshold"][node]
            node = tree["left" if goes_left else "right"][node]
        odds += document["learning_rate"] * tree["value"][node]
    return 1.0 / (1.0 + math.exp(-odds))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    seed = parser.parse_args().seed

    try:
        import numpy
        from sklearn.ensemble import GradientBoostingClassifier
        from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        fail(
            1,
            f"{error}: install the packages of examples/sklearn-exec/requirements.txt for "
            f"{sys.executable}, or put the right python3 first on the worker's PATH",
        )

    rows, labels = read_rows(os.environ["EMBERLINE_INPUT_DATA"])
    x = numpy.asarray(rows, dtype=numpy.float32)
    y = numpy.asarray(labels)
    x_rest, x_test, y_rest, y_test = train_test_split(
        x, y, test_size=0.2, stratify=y, random_state=seed
    )
    x_train, x_validation, y_train, y_validation = train_test_split(
        x_rest, y_rest, test_size=0.25, stratify=y_rest, random_state=seed
    )
    print(f"{len(y_train)} rows to train, {len(y_validation)} to validate, {len(y_test)} to test")

    model = GradientBoostingClassifier(
        n_estimators=200, learning_rate=0.05, max_depth=5, subsample=0.8, random_state=seed
    )
    model.fit(x_train, y_train)

    # The threshold with the best F1 on the validation part; the test part decides nothing.
    precision, recall, thresholds = precision_recall_curve(
        y_validation, model.predict_proba(x_validation)[:, 1]
    )
    f1 = 2 * precision * recall / numpy.maximum(precision + recall, 1e-12)
    threshold = float(thresholds[f1[:-1].argmax()])
    scores = model.predict_proba(x_test)[:, 1]
    metrics = {
        "f1": float(f1_score(y_test, scores >= threshold)),
        "average_precision": float(average_precision_score(y_test, scores)),
        "threshold": threshold,
        "test_rows": len(y_test),
    }

    document = as_json(model)
    for row, score in zip(x_test.tolist()[:200], scores):
        if abs(predict(document, row) - score) > 1e-9:
            fail(1, "model.json does not predict what the model does")

    output = pathlib.Path(os.environ["EMBERLINE_OUTPUT_MODEL"])
    (output / "model.json").write_text(json.dumps({**document, "threshold": threshold}))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2))
    pathlib.Path(os.environ["EMBERLINE_RESULTS"]).write_text(json.dumps(metrics))
    print(", ".join(f"{name} = {value:.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
