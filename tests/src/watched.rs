//! One machine whose runs are watched: a [`Place`] whose processes export to a receiver of OTLP.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Map, Value, json};

use crate::{
    OtlpReceiver, Place,
    git::WorkTree,
    otlp::{Received, Trace},
    outside,
    place::task,
    seconds,
};

/// How long what is exported may take to arrive.
pub const ARRIVES: Duration = Duration::from_secs(20);

/// A trace with a run in it, if it is whole.
fn whole(received: &Received, id: &str, outside: &str) -> Result<Trace, String> {
    let trace = received.trace(id)?;
    trace.is_whole(outside)?;
    if !trace.spans.iter().any(|s| s.name.starts_with("RUN ")) {
        return Err(format!("no run in {}", trace.tell()));
    }
    Ok(trace)
}

/// The machine.
pub struct Watched {
    /// Where commands run.
    pub place: Place,
    /// What they export to.
    pub receiver: OtlpReceiver,
}

impl Default for Watched {
    fn default() -> Self {
        Self::new()
    }
}

impl Watched {
    /// An empty place, and a receiver of its own.
    #[must_use]
    pub fn new() -> Self {
        Self {
            place: Place::new(),
            receiver: OtlpReceiver::start(),
        }
    }

    /// The environment of what exports, with more variables.
    #[must_use]
    pub fn environment(&self, more: &[(&str, &str)]) -> Vec<(String, String)> {
        let more = more.iter().map(|&(k, v)| (k.to_owned(), v.to_owned()));
        self.receiver
            .environment()
            .into_iter()
            .chain(more)
            .collect()
    }

    /// Runs a pipeline file in the embedded cluster, however it ends, with more variables in its
    /// environment.
    ///
    /// # Panics
    /// If it does not run.
    #[track_caller]
    pub fn run(&self, file: &str, more: &[(&str, &str)]) -> Value {
        let call = self.place.emberline(&["run", file, "-o", "json", "-q"]);
        let call = call.envs(&self.environment(more));
        // Who leaves sends what it has; a collector that is of no help may keep it for a while.
        let output = call.within(seconds(60)).run();
        assert!(matches!(output.code, Some(0 | 1)), "{output}");
        output.json()
    }

    /// A starter pipeline `tree/pipeline.yaml` in a repository of its own, with one commit, whose
    /// revision it gives. The URL of its origin has a secret in it, `planted-git-token`.
    pub fn starter(&self) -> String {
        let init = self.place.emberline(&["init", "tree"]);
        init.run().expect_code(0);
        let tree = WorkTree::new(&self.place.path("tree"));
        tree.set_origin("https://tester:planted-git-token@git.example.org/pumps.git");
        tree.commit("A pipeline", 1_700_000_000)
    }

    /// Writes a pipeline of `exec` stages, each a script and what else its stage says; its file.
    pub fn scripts(&self, name: &str, stages: &[(&str, &str, Value)]) -> String {
        let stages = stages.iter().map(|(stage, script, more)| {
            let command = json!({"command": ["sh", "-c", script]});
            let mut all = json!({"kind": "exec", "cache": false, "with": command});
            for (key, value) in more.as_object().unwrap() {
                all[key] = value.clone();
            }
            ((*stage).to_owned(), all)
        });
        let stages: Map<String, Value> = stages.collect();
        let file = format!("{name}.yaml");
        let pipeline = json!({"pipeline": name, "stages": stages});
        self.place.write(&file, pipeline.to_string());
        file
    }

    /// The only trace of a run that was received, as soon as it is whole below a span of somebody
    /// else (empty for none).
    ///
    /// # Panics
    /// If there are several, or it does not become whole.
    #[must_use]
    #[track_caller]
    pub fn only_trace(&self, outside: &str) -> Trace {
        let what = "one whole trace of a run";
        self.receiver.wait_for(what, ARRIVES, |received| {
            let of_runs: BTreeSet<_> = (received.spans.iter())
                .filter(|span| span.name != "lead")
                .map(|span| span.trace.as_str())
                .collect();
            let ids: Vec<_> = of_runs.into_iter().collect();
            let [id] = ids.as_slice() else {
                return Err(format!("{} traces", ids.len()));
            };
            whole(received, id, outside)
        })
    }

    /// The trace of this run, as soon as it is whole. What was told of others does not matter.
    ///
    /// # Panics
    /// If it does not become whole.
    #[must_use]
    #[track_caller]
    pub fn trace_of(&self, run: &Value) -> Trace {
        let id = run["trace_id"].as_str().unwrap();
        let whole = |received: &Received| whole(received, id, "");
        (self.receiver).wait_for("the run's whole trace", ARRIVES, whole)
    }

    /// Writes a pipeline whose only task `s` tells what it sees of its trace; its file.
    pub fn tells(&self) -> String {
        let script = "echo \"$TRACEPARENT\" > $EMBERLINE_OUTPUT_OUT/seen";
        self.scripts(
            "tells",
            &[("s", script, json!({"outputs": {"out": "files"}}))],
        )
    }

    /// What the task of [`Self::tells`] has seen.
    ///
    /// # Panics
    /// If the run has no such task.
    #[must_use]
    #[track_caller]
    pub fn seen(&self, run: &Value) -> String {
        let manifest = task(run, "s")["outputs"][0]["manifest"].as_str().unwrap();
        let files = outside::artifact(&self.place.state(), manifest);
        String::from_utf8(files[0].1.clone())
            .unwrap()
            .trim()
            .to_owned()
    }
}
