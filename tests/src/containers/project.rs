//! A cluster of `deploy/compose.yaml` on images without a registry, with ports of its own; what a client from
//! outside is told by it; and at the end, whether what it had acknowledged is there and whole.

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use emberline_proto::v1::{GetRunResponse, RunState, SubmitRunRequest};
use flate2::read::GzDecoder;
use serde_json::Value;
use tempfile::TempDir;

use super::engine::{Engine, succeeds};
use crate::{
    client::{Client, state_of},
    outside,
    pipelines::Journal,
    place::repository,
    processes, seconds, wait_for,
};

const NAME: &str = "emberline-test";
/// How long a call may wait for a leader, on a machine that is busy with starting containers.
const CALL: Duration = Duration::from_secs(60);
/// How long an accepted run may take after the last fault.
const END: Duration = Duration::from_secs(120);

/// What is left in etcd of an accepted run that has ended.
pub struct Rest {
    /// Its record.
    pub record: Value,
    /// Its archive, from the bucket.
    pub archive: Value,
}

/// A cluster of containers.
pub struct Project<'a> {
    /// The engine that it runs on.
    pub engine: &'a Engine,
    /// A client outside of it.
    pub client: Client,
    /// What its tasks have written down.
    pub journal: Journal,
    /// Where its coordinators are.
    pub coordinators: Vec<String>,
    /// Where it serves models.
    pub serving: String,
    /// Where Prometheus answers.
    pub prometheus: String,
    environment: Vec<(String, String)>,
    acknowledged: Mutex<Vec<String>>,
    requests: AtomicUsize,
    root: TempDir,
}

impl<'a> Project<'a> {
    /// One that does not run yet; what an earlier test left of it is removed.
    #[must_use]
    pub fn new(engine: &'a Engine) -> Self {
        let root = tempfile::tempdir().unwrap();
        // Tasks run as the image's user.
        let everyone = |dir: &PathBuf| {
            fs::create_dir_all(dir).unwrap();
            fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        };
        everyone(&root.path().to_path_buf());
        let journal = root.path().join("journal");
        everyone(&journal);
        let ports: Vec<_> = (0..5).map(|_| processes::free_port()).collect();
        let address = |port: usize| format!("127.0.0.1:{}", ports[port]);
        let variable = |name: &str, value: String| (name.to_owned(), value);
        let environment = vec![
            variable("EMBERLINE_PORT_1", ports[0].to_string()),
            variable("EMBERLINE_PORT_2", ports[1].to_string()),
            variable("EMBERLINE_PORT_3", ports[2].to_string()),
            variable("EMBERLINE_SERVE_PORT", ports[3].to_string()),
            variable("PROMETHEUS_PORT", ports[4].to_string()),
            variable("EMBERLINE_WORKER_CPUS", "1".to_owned()),
            variable("EMBERLINE_TEST_DIR", root.path().display().to_string()),
        ];
        let project = Self {
            engine,
            client: Client::new((0..3).map(address).collect()),
            coordinators: (0..3).map(address).collect(),
            journal: Journal::new(&journal),
            serving: address(3),
            prometheus: address(4),
            environment,
            acknowledged: Mutex::default(),
            requests: AtomicUsize::new(0),
            root,
        };
        project.remove();
        project
    }

    /// `docker compose` with these arguments.
    fn command(&self, arguments: &[&str]) -> Command {
        let deploy = repository().join("deploy");
        let mut command = self.engine.docker(&["compose", "--project-name", NAME]);
        command.arg("--project-directory").arg(&deploy);
        for file in [
            deploy.join("compose.yaml"),
            deploy.join("compose.local.yaml"),
            repository().join("tests/containers/compose.yaml"),
        ] {
            command.arg("--file").arg(file);
        }
        command.args(["--profile", "observability"]);
        command.args(arguments);
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// What `docker compose` prints with these arguments.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn compose(&self, arguments: &[&str]) -> String {
        succeeds(self.command(arguments))
    }

    /// Brings it up, with so many workers beside the one that serves.
    #[track_caller]
    pub fn up(&self, workers: usize) {
        let scale = format!("worker={workers}");
        self.compose(&["up", "--detach", "--quiet-pull", "--scale", &scale]);
    }

    /// Where the certificate and the token of the command line are.
    #[must_use]
    #[track_caller]
    pub fn secrets(&self) -> PathBuf {
        self.engine.volume(&format!("{NAME}_secrets-cli"))
    }

    /// Takes it down; volumes with names are kept.
    #[track_caller]
    pub fn down(&self) {
        self.compose(&["down"]);
    }

    fn remove(&self) {
        let down = ["down", "--volumes", "--remove-orphans", "--timeout", "1"];
        if let Err(e) = self.command(&down).output() {
            eprintln!("{NAME} may be left over: {e}");
        }
    }

    /// The containers of a service, running or not, in the order of their numbers.
    #[must_use]
    #[track_caller]
    pub fn containers(&self, service: &str) -> Vec<String> {
        let listed = self.compose(&["ps", "--all", "--format", "{{.Name}}", service]);
        let mut names: Vec<_> = listed.lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// The one container of a service.
    #[must_use]
    #[track_caller]
    pub fn container(&self, service: &str) -> String {
        let names = self.containers(service);
        assert_eq!(names.len(), 1, "{service}: {names:?}");
        names.into_iter().next().unwrap()
    }

    /// Waits until a container is healthy.
    #[track_caller]
    pub fn wait_for_health(&self, container: &str) {
        wait_for(&format!("{container} is healthy"), seconds(90), || {
            let state = &self.engine.inspect(container)["State"];
            (state["Health"]["Status"] == "healthy").then_some(())
        });
    }

    /// The service of the coordinator that leads, as etcd says, and its term.
    #[must_use]
    pub fn leader(&self) -> Option<(String, i64)> {
        let found = self.etcd("emberline/leader");
        let (_, value, created) = found.into_iter().next()?;
        Some((value["name"].as_str()?.to_owned(), created))
    }

    /// Waits until somebody leads.
    #[must_use]
    #[track_caller]
    pub fn wait_for_leader(&self) -> (String, i64) {
        wait_for("a leader", seconds(60), || self.leader())
    }

    /// Waits until somebody leads in a later term.
    #[track_caller]
    pub fn wait_for_leader_after(&self, term: i64) -> (String, i64) {
        wait_for("another leader", seconds(60), || {
            self.leader().filter(|(_, later)| *later > term)
        })
    }

    /// What etcd has below a prefix, by its own client in the container of a member that runs: key, value,
    /// create revision. Nothing while etcd does not answer.
    #[must_use]
    pub fn etcd(&self, prefix: &str) -> Vec<(String, Value, i64)> {
        for member in ["etcd-1", "etcd-2", "etcd-3"] {
            let mut get = vec!["exec", "--no-TTY", member, "etcdctl"];
            get.extend(["get", "--prefix", prefix, "--write-out", "json"]);
            let Ok(output) = self.command(&get).output() else {
                continue;
            };
            let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else {
                continue;
            };
            let all = answer["kvs"].as_array().cloned().unwrap_or_default();
            let one = |kv: &Value| {
                let text = |name: &str| base64(kv[name].as_str().unwrap_or_default());
                let key = String::from_utf8(text("key")).unwrap();
                let value = serde_json::from_slice(&text("value")).unwrap_or_default();
                (key, value, kv["create_revision"].as_i64().unwrap())
            };
            return all.iter().map(one).collect();
        }
        Vec::new()
    }

    /// Submits until somebody accepts it, and remembers that it was acknowledged.
    ///
    /// # Panics
    /// If nobody does.
    #[track_caller]
    pub fn submit(&self, pipeline: &str) -> String {
        self.submit_from(pipeline, &self.root.path().display().to_string())
    }

    /// The same, with a directory that its relative paths start at, in the worker's container.
    #[track_caller]
    pub fn submit_from(&self, pipeline: &str, base_dir: &str) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let request = SubmitRunRequest {
            pipeline_yaml: pipeline.to_owned(),
            file_name: "p.yaml".to_owned(),
            base_dir: base_dir.to_owned(),
            request_id: format!("request-{number}"),
            trigger: "manual".to_owned(),
            ..Default::default()
        };
        let run = self.client.submit(&request, CALL).unwrap();
        self.acknowledged.lock().unwrap().push(run.clone());
        run
    }

    /// Submits one small run after the other until told to stop.
    pub fn submit_until(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let run = self.submit(&self.journal.chains(2, 2));
            self.succeeds(&run);
        }
    }

    /// How many runs were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until a run has ended well.
    ///
    /// # Panics
    /// If it ends otherwise, or not.
    #[track_caller]
    pub fn succeeds(&self, run: &str) -> GetRunResponse {
        let ended = wait_for("the run ends", END, || {
            let seen = self.client.run(run, CALL).unwrap();
            let is_over = matches!(
                state_of(&seen),
                RunState::Succeeded | RunState::Failed | RunState::Cancelled
            );
            is_over.then_some(seen)
        });
        assert_eq!(state_of(&ended), RunState::Succeeded, "{ended:#?}");
        ended
    }

    /// Waits until a task has begun so many attempts, as its own journal says.
    #[track_caller]
    pub fn wait_for_begin(&self, run: &str, task: &str, attempts: usize) {
        let what = format!("attempt {attempts} of {task} begins");
        wait_for(&what, seconds(60), || {
            (self.journal.begun(run, task) >= attempts).then_some(())
        });
    }

    /// The directory above the objects in the bucket.
    fn bucket(&self) -> PathBuf {
        let volume = self.engine.volume(&format!("{NAME}_s3-data"));
        volume.join("emberline")
    }

    /// What is left of a run that has ended: its record in etcd, and its archive in the bucket.
    ///
    /// # Panics
    /// If one is not there, or the archive is not what its name says.
    #[must_use]
    #[track_caller]
    pub fn rest(&self, run: &str, ended: &[(String, Value, i64)]) -> Rest {
        let key = format!("emberline/state/ended/{run}");
        let record = ended.iter().find(|(k, _, _)| *k == key);
        let (_, record, _) =
            record.unwrap_or_else(|| panic!("{run} was acknowledged, and is lost"));
        let digest = record["archive"].as_str().unwrap();
        let packed = fs::read(outside::object(&self.bucket(), digest)).unwrap();
        assert_eq!(outside::sha256(&packed), digest);
        let mut text = String::new();
        GzDecoder::new(&packed[..])
            .read_to_string(&mut text)
            .unwrap();
        Rest {
            record: record.clone(),
            archive: serde_json::from_str(&text).unwrap(),
        }
    }

    /// Nothing that was acknowledged is lost: each run has ended well, by its record, its archive, its
    /// outputs in the bucket and what its tasks have written down; nothing else is live or was made.
    ///
    /// # Panics
    /// If that is not so: the message says what and where.
    #[track_caller]
    pub fn check(&self) {
        let live = |(key, _, _): &(String, Value, i64)| {
            let kinds = ["/state/runs/", "/state/tasks/", "/journal/"];
            kinds
                .iter()
                .any(|kind| key["emberline".len()..].starts_with(kind))
        };
        let all = wait_for("nothing is live", END, || {
            let all = self.etcd("emberline/");
            (!all.is_empty() && !all.iter().any(live)).then_some(all)
        });
        let accepted: BTreeSet<_> = self.acknowledged.lock().unwrap().iter().cloned().collect();
        let prefix = "emberline/state/ended/";
        let made = all
            .iter()
            .filter_map(|(key, _, _)| key.strip_prefix(prefix));
        let made: BTreeSet<_> = made.map(str::to_owned).collect();
        assert_eq!(made, accepted, "runs that were made, and acknowledged");
        let bucket = self.bucket();
        outside::every_object_hashes_to_its_name(&bucket);
        let entries = self.journal.entries();
        let mut seen = BTreeSet::new();
        for entry in &entries {
            assert!(seen.insert(entry), "{entry:?} is there twice");
        }
        for run in &accepted {
            let rest = self.rest(run, &all);
            let view = &rest.archive["view"];
            assert_eq!(view["state"], "succeeded", "{view:#}");
            outside::run_is_whole(&bucket, view);
            for task in view["tasks"].as_array().unwrap() {
                let name = task["task"].as_str().unwrap();
                if self.journal.begun(run, name) == 0 {
                    continue;
                }
                // What it is credited with was made by an attempt that came to its end.
                let manifest = task["outputs"][0]["manifest"].as_str().unwrap();
                let who = outside::artifact(&bucket, manifest)[0].1.clone();
                let who = String::from_utf8(who).unwrap();
                assert_eq!(who, format!("{name} {}\n", task["attempt"]), "{run}");
            }
        }
    }
}

impl Drop for Project<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for arguments in [
                &["ps", "--all"][..],
                &["logs", "--no-color", "--tail", "40"],
            ] {
                if let Ok(output) = self.command(arguments).output() {
                    eprintln!("{}", String::from_utf8_lossy(&output.stdout));
                }
            }
        }
        self.remove();
    }
}

/// Decodes what `etcdctl` prints.
fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<_> = text.bytes().filter(|&c| c != b'=').map(digit).collect();
    let mut out = Vec::new();
    for four in digits.chunks(4) {
        let bits =
            four.iter().fold(0, |bits, &d| bits << 6 | u32::from(d)) << (6 * (4 - four.len()));
        out.extend(&bits.to_be_bytes()[1..four.len()]);
    }
    out
}
