//! Gates: what a metric must be, written as a comparison.

use std::{collections::BTreeMap, fmt};

use emberline_common::spec::{Ordered, kinds::evaluate::METRICS};
use emberline_worker::documents::GateResult;

use crate::error::TrainError;

/// A comparison with a number, e.g. `>= 0.60`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    operator: Operator,
    bound: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    AtLeast,
    Above,
    AtMost,
    Below,
}

impl std::str::FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = "write a gate as `>= 0.60`, with `>=`, `>`, `<=` or `<` and a number";
        let trimmed = text.trim();
        let (operator, rest) = [
            (">=", Operator::AtLeast),
            ("<=", Operator::AtMost),
            (">", Operator::Above),
            ("<", Operator::Below),
        ]
        .into_iter()
        .find_map(|(sign, operator)| Some((operator, trimmed.strip_prefix(sign)?)))
        .ok_or_else(|| format!("`{}` is no gate: {rule}", text.escape_debug()))?;
        match rest.trim().parse::<f64>() {
            Ok(bound) if bound.is_finite() => Ok(Self { operator, bound }),
            _ => Err(format!("`{}` is no gate: {rule}", text.escape_debug())),
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.operator {
            Operator::AtLeast => ">=",
            Operator::Above => ">",
            Operator::AtMost => "<=",
            Operator::Below => "<",
        };
        write!(f, "{sign} {}", self.bound)
    }
}

impl Gate {
    /// Whether the value holds, and by how much it does (or, negative, does not).
    #[must_use]
    pub fn check(&self, value: f64) -> (bool, f64) {
        match self.operator {
            Operator::AtLeast => (value >= self.bound, value - self.bound),
            Operator::Above => (value > self.bound, value - self.bound),
            Operator::AtMost => (value <= self.bound, self.bound - value),
            Operator::Below => (value < self.bound, self.bound - value),
        }
    }
}

/// Checks all gates against the measured metrics.
///
/// # Errors
/// If a gate cannot be read, or names a metric that was not or could not be measured.
pub fn check_all(
    gates: &Ordered<String, String>,
    metrics: &BTreeMap<String, f64>,
) -> Result<Vec<GateResult>, TrainError> {
    gates
        .iter()
        .map(|(metric, text)| {
            let gate: Gate = text
                .parse()
                .map_err(|e| TrainError::Spec(format!("`gates.{metric}`: {e}")))?;
            let value = measured(metrics, metric, &format!("gates.{metric}"))?;
            let (passed, margin) = gate.check(value);
            Ok(GateResult {
                metric: metric.clone(),
                gate: text.clone(),
                value,
                passed,
                margin,
            })
        })
        .collect()
}

/// The value of a metric that a setting names.
///
/// # Errors
/// If there is no such metric for this model, or the rows do not allow to measure it.
pub fn measured(
    metrics: &BTreeMap<String, f64>,
    metric: &str,
    setting: &str,
) -> Result<f64, TrainError> {
    metrics.get(metric).copied().ok_or_else(|| {
        let regression = metrics.contains_key("rmse");
        let fits = matches!(metric, "mae" | "mse" | "rmse" | "r2" | "mape") == regression;
        if METRICS.contains(&metric) && fits {
            TrainError::Data(format!(
                "`{setting}`: `{metric}` has no value on these rows (for `roc_auc` and `average_precision` there must be rows of every class, for `r2` different values, for `mape` no 0)"
            ))
        } else {
            let names: Vec<_> = metrics.keys().map(String::as_str).collect();
            TrainError::Spec(format!(
                "`{setting}`: there is no metric `{metric}` for this model; there are {}",
                names.join(", ")
            ))
        }
    })
}

/// What the failed gates say, one after the other; `None` if all hold.
#[must_use]
pub fn failure(results: &[GateResult]) -> Option<String> {
    let failed: Vec<_> = results
        .iter()
        .filter(|r| !r.passed)
        .map(|r| {
            format!(
                "{} is {:.4}, but the gate asks for {}: short by {:.4}",
                r.metric, r.value, r.gate, -r.margin
            )
        })
        .collect();
    (!failed.is_empty()).then(|| failed.join("; "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_gate_says_by_how_much() {
        let gate: Gate = " >= 0.60".parse().unwrap();
        let (passed, margin) = gate.check(0.55);
        assert!(!passed && (margin + 0.05).abs() < 1e-12);
        assert!(gate.check(0.60).0);
        assert!(!"> 0.6".parse::<Gate>().unwrap().check(0.6).0);
        let (passed, margin) = "<= 2".parse::<Gate>().unwrap().check(2.5);
        assert!(!passed && (margin + 0.5).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_comparison_is_refused() {
        for bad in ["0.6", ">=", ">= high", "=> 1", ">= NaN", "!= 1", ">= 1 2"] {
            assert!(bad.parse::<Gate>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_gate_on_an_unknown_metric_names_the_known_ones() {
        let metrics = BTreeMap::from([("f1".to_owned(), 0.7)]);
        let gates = Ordered::from_iter([("f2".to_owned(), ">= 0".to_owned())]);
        let error = check_all(&gates, &metrics).unwrap_err();
        assert!(matches!(error, TrainError::Spec(_)));
        assert!(error.to_string().contains("there are f1"), "{error}");
    }

    #[test]
    fn a_gate_on_a_metric_without_a_value_is_the_data_s_fault() {
        let metrics = BTreeMap::from([("f1".to_owned(), 0.7)]);
        let gates = Ordered::from_iter([("roc_auc".to_owned(), ">= 0.5".to_owned())]);
        assert!(matches!(
            check_all(&gates, &metrics),
            Err(TrainError::Data(_))
        ));
    }

    #[test]
    fn all_failed_gates_are_named_together() {
        let metrics = BTreeMap::from([("f1".to_owned(), 0.5), ("recall".to_owned(), 0.4)]);
        let gates = Ordered::from_iter([
            ("f1".to_owned(), ">= 0.6".to_owned()),
            ("recall".to_owned(), "> 0.5".to_owned()),
        ]);
        let text = failure(&check_all(&gates, &metrics).unwrap()).unwrap();
        assert!(text.contains("f1") && text.contains("recall") && text.contains("0.1000"));
    }
}
