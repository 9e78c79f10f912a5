//! A model that is delivered and served: the data and the pipeline of some pumps, and what can be asked of
//! its deployments.

use std::{cell::RefCell, time::Duration};

use serde_json::Value;

use crate::{Place, seconds, wait_for};

/// The data: pumps above a pressure of 31 are worn. In `bad.csv` it is the other way round.
fn rows(worn: impl Fn(u64) -> bool) -> String {
    let row = |pressure| {
        let state = if worn(pressure) { "worn" } else { "healthy" };
        format!("{pressure},{state}\n")
    };
    let rows: String = (0..crate::traffic::PRESSURES).map(row).collect();
    format!("pressure,state\n{rows}")
}

/// Who delivers it.
pub struct Fleet {
    /// Where it works.
    pub place: Place,
    /// Arguments that name the cluster; none for the embedded one.
    cluster: Vec<String>,
    runs: RefCell<Vec<String>>,
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new()
    }
}

impl Fleet {
    /// With its data, on the cluster of the place's state directory.
    #[must_use]
    pub fn new() -> Self {
        let place = Place::new();
        place.write("good.csv", rows(|pressure| pressure > 31));
        place.write("bad.csv", rows(|pressure| pressure <= 31));
        Self {
            place,
            cluster: Vec::new(),
            runs: RefCell::default(),
        }
    }

    /// Its cluster is that of these coordinators.
    #[must_use]
    pub fn on(mut self, servers: &[String]) -> Self {
        self.cluster = vec!["--server".to_owned(), servers.join(",")];
        self
    }

    /// Calls the binary, which must leave with 0, and reads its output as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let cluster = self.cluster.iter().map(String::as_str);
        let all: Vec<_> = arguments.iter().copied().chain(cluster).collect();
        self.place.json(&all)
    }

    /// Calls the binary.
    #[must_use]
    pub fn call(&self, arguments: &[&str]) -> crate::Output {
        let cluster = self.cluster.iter().map(String::as_str);
        let all: Vec<_> = arguments.iter().copied().chain(cluster).collect();
        self.place.emberline(&all).run()
    }

    /// Trains on `data` with `seed` and deploys as `deploy` says (the end of a flow map in YAML, e.g.
    /// `, replicas: 2`). Gives the newest deployment's id.
    #[track_caller]
    pub fn deliver(&self, data: &str, seed: u32, deploy: &str) -> String {
        let pipeline = format!(
            "\
pipeline: pumps
stages:
  raw: {{ kind: collect, with: {{ sources: [ {{ url: 'file:{data}.csv' }} ] }} }}
  table: {{ kind: convert, inputs: {{ raw: raw.data }} }}
  train:
    kind: train
    inputs: {{ train: table.data, validation: table.data }}
    with: {{ task: classification, label: state, model: {{ family: mlp, hidden: [8] }}, epochs: 120, batch_size: 16, seed: {seed}, optimizer: {{ learning_rate: 0.05 }} }}
  deploy: {{ kind: deploy, inputs: {{ model: train.model }}, with: {{ model: pumps, alias: champion{deploy} }} }}
"
        );
        self.place.write("pumps.yaml", pipeline);
        let run = self.json(&["run", "pumps.yaml", "-q"]);
        assert_eq!(run["state"], "succeeded", "{run:#}");
        let id = run["run"].as_str().unwrap().to_owned();
        self.runs.borrow_mut().push(id);
        let newest = self.json(&["deployments", "list", "--limit", "1"]);
        newest[0]["deployment"].as_str().unwrap().to_owned()
    }

    /// The runs that have delivered something.
    #[must_use]
    pub fn runs(&self) -> Vec<String> {
        self.runs.borrow().clone()
    }

    /// A deployment.
    #[track_caller]
    #[must_use]
    pub fn deployment(&self, id: &str) -> Value {
        self.json(&["deployments", "show", id])
    }

    /// Waits until a deployment has this outcome.
    #[track_caller]
    pub fn wait_for_outcome(&self, id: &str, outcome: &str, within: Duration) -> Value {
        let mut last = Value::Null;
        wait_for(&format!("{id} is {outcome}"), within, || {
            last = self.deployment(id);
            let now = last["outcome"].as_str().unwrap();
            assert!(
                now == outcome || now == "in_progress",
                "{id} is {now}: {last:#}"
            );
            (now == outcome).then(|| last.clone())
        })
    }

    /// Waits until a deployment is in this phase of its rollout.
    #[track_caller]
    pub fn wait_for_phase(&self, id: &str, phase: &str) -> Value {
        wait_for(&format!("{id} is {phase}"), seconds(20), || {
            let now = self.deployment(id);
            (now["rollout"]["phase"] == phase).then_some(now)
        })
    }

    /// What is live in production, and who serves it.
    #[track_caller]
    #[must_use]
    pub fn live(&self) -> Value {
        self.json(&["environments"])[0].clone()
    }

    /// Where the ready replicas answer.
    #[track_caller]
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let live = self.live();
        let replicas = live["replicas"].as_array().unwrap().iter();
        let ready = replicas.filter(|r| r["ready"] == true && r["placed"] == true);
        let addresses = ready.map(|r| r["address"].as_str().unwrap().to_owned());
        addresses.collect()
    }
}
