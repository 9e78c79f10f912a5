//! A team that delivers a model: a Git repository with a pipeline that trains and deploys in a moment,
//! and the command line as that team uses it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::{Place, git::WorkTree};

/// The pipeline of a [`Team`]. Another `seed` is another model.
pub const PIPELINE: &str = "\
pipeline: pumps
params: { seed: 1 }
stages:
  raw: { kind: collect, with: { sources: [ { url: 'file:pumps.csv' } ] } }
  table: { kind: convert, inputs: { raw: raw.data } }
  train:
    kind: train
    inputs: { train: table.data, validation: table.data }
    with: { task: classification, label: state, model: { family: mlp, hidden: [4] }, epochs: 2, batch_size: 8, seed: \"${params.seed}\" }
  deploy: { kind: deploy, inputs: { model: train.model }, with: { model: pumps, alias: champion } }
";

/// The team.
pub struct Team {
    /// Where it works.
    pub place: Place,
    /// Its repository, in `tree`.
    pub tree: WorkTree,
    /// Arguments that name the cluster; none for the embedded one.
    cluster: Vec<String>,
}

impl Default for Team {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds since 1970, so long ago.
#[must_use]
pub fn ago(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs() - seconds
}

impl Team {
    /// With a repository that has the pipeline and its data, and no commit yet. The URL of its origin
    /// has a secret in it, `planted-git-token`.
    #[must_use]
    pub fn new() -> Self {
        let place = Place::new();
        let row = |x| format!("{x},{}\n", if x % 2 == 0 { "worn" } else { "healthy" });
        let rows: String = (1..=16).map(row).collect();
        place.write("tree/pumps.csv", format!("pressure,state\n{rows}"));
        place.write("tree/pumps.yaml", PIPELINE);
        let tree = WorkTree::new(&place.path("tree"));
        tree.set_origin("https://tester:planted-git-token@git.example.org/pumps.git");
        Self {
            place,
            tree,
            cluster: Vec::new(),
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
    pub fn json(&self, arguments: &[&str]) -> Value {
        let cluster = self.cluster.iter().map(String::as_str);
        let all: Vec<_> = arguments.iter().copied().chain(cluster).collect();
        self.place.json(&all)
    }

    /// Runs the pipeline with this seed and perhaps more arguments. Gives the run, which has
    /// succeeded.
    #[track_caller]
    pub fn run(&self, seed: u32, more: &[&str]) -> Value {
        let seed = format!("seed={seed}");
        let run = ["run", "tree/pumps.yaml", "-q", "-p", &seed];
        let run = self.json(&[&run, more].concat());
        assert_eq!(run["state"], "succeeded", "{run:#}");
        run
    }

    /// A deployment.
    #[track_caller]
    #[must_use]
    pub fn deployment(&self, id: &Value) -> Value {
        self.json(&["deployments", "show", id.as_str().unwrap()])
    }

    /// All deployments, oldest first.
    #[track_caller]
    #[must_use]
    pub fn deployments(&self) -> Vec<Value> {
        let list = self.json(&["deployments", "list"]);
        let list = list.as_array().unwrap().iter().rev();
        list.map(|listed| {
            let shown = self.deployment(&listed["deployment"]);
            for (name, value) in listed.as_object().unwrap() {
                // Commits are left out of the list.
                if name != "change" {
                    assert_eq!(&shown[name], value, "`{name}` of the list and of `show`");
                }
            }
            shown
        })
        .collect()
    }
}
