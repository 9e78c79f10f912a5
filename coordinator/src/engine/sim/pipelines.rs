//! Random pipelines: graphs, matrices, conditions, retries, limits.

use emberline_common::spec::PipelineSpec;
use serde_json::{Map, Value, json};

use crate::engine::retries::Random;

/// A random pipeline of up to six stages.
pub(super) fn random(rng: &mut Random) -> Result<PipelineSpec, String> {
    let mut stages = Map::new();
    let mut single: Vec<bool> = Vec::new();
    let count = 1 + rng.below(6);
    for number in 0..count {
        let kind = ["noop", "convert", "convert", "deploy"][index(rng.below(4))];
        let cpu = [0.0, 0.5, 1.0, 2.0][index(rng.below(4))];
        let run_if = ["success", "success", "success", "always", "failure"][index(rng.below(5))];
        let mut stage = json!({
            "kind": kind,
            "with": match kind {
                "convert" => json!({"x": rng.below(3)}),
                "deploy" => deploy(rng),
                _ => Value::Null,
            },
            "resources": {"cpu": cpu},
            "retries": {
                "errors": rng.below(3), "faults": rng.below(3), "lost_workers": rng.below(4),
                "backoff": format!("{}ms", 1 + rng.below(500)), "max_backoff": "1s"
            },
            "run_if": run_if,
            "cache": rng.below(8) > 0,
        });
        let has_matrix = rng.below(4) == 0;
        if has_matrix {
            stage["matrix"] = json!({"m": (0..=rng.below(4)).collect::<Vec<_>>()});
            if kind != "deploy" {
                stage["with"] = json!({"m": "${matrix.m}"});
            }
        }
        if rng.below(4) == 0 {
            stage["timeout"] = json!(format!("{}ms", 50 + rng.below(400)));
        }
        if rng.below(8) == 0 {
            stage["labels"] = json!({"zone": "a"});
        }
        let (mut inputs, mut needs) = (Map::new(), Vec::new());
        for up in 0..number {
            match rng.below(4) {
                0 => {
                    inputs.insert(format!("i{up}"), json!(format!("s{up}.out")));
                    if single[index(up)] && rng.below(3) == 0 {
                        stage["when"] = json!(format!("s{up}.score >= 0.3"));
                    }
                }
                1 => needs.push(format!("s{up}")),
                _ => {}
            }
        }
        stage["inputs"] = Value::Object(inputs);
        stage["needs"] = json!(needs);
        single.push(!has_matrix);
        stages.insert(format!("s{number}"), stage);
    }
    let mut pipeline = json!({
        "pipeline": format!("p{}", rng.below(3)),
        "priority": rng.below(3),
        "fail_fast": rng.below(2) == 0,
        "stages": stages,
    });
    if rng.below(6) == 0 {
        pipeline["timeout"] = json!(format!("{}ms", 200 + rng.below(3000)));
    }
    serde_json::from_value(pipeline).map_err(|error| error.to_string())
}

/// How a version is to come into service; everything is over within seconds.
fn deploy(rng: &mut Random) -> Value {
    let conditions = json!({"max_error_rate": 0.3});
    let time = |rng: &mut Random| format!("{}ms", 1 + rng.below(200));
    let strategy = match rng.below(4) {
        0 => json!({"type": "all_at_once"}),
        1 => json!({
            "type": "all_at_once", "watch_for": time(rng), "min_requests": 2,
            "conditions": conditions,
        }),
        2 => {
            json!({"type": "shadow", "for": time(rng), "min_requests": 2, "conditions": conditions})
        }
        _ => json!({
            "type": "canary", "min_requests": 2, "conditions": conditions,
            "steps": [{"weight": 10, "for": time(rng)}, {"weight": 50, "for": time(rng)}],
        }),
    };
    let environment = ["production", "production", "staging"][index(rng.below(3))];
    json!({
        "model": "m",
        "environment": environment,
        "replicas": 1 + rng.below(2),
        "progress_deadline": format!("{}ms", 500 + rng.below(1500)),
        "strategy": strategy,
    })
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(0)
}
