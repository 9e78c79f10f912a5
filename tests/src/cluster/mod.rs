//! A whole cluster of separate processes: etcd members, coordinators, workers, a shared directory
//! for artifacts; a client; and at the end the invariants, looked at from outside.
//!
//! Start with [`Builder`], then [`Cluster::submit`], do harm, and end with [`Cluster::check`].

mod check;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use emberline_proto::v1::{GetRunResponse, RunState, SubmitRunRequest};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Etcd, History, S3Server, TcpProxy,
    client::{Client, state_of},
    node::Node,
    pipelines::Journal,
    processes, s3, seconds, wait_for,
};

/// What every key of the cluster begins with.
pub const PREFIX: &str = "emberline";
/// How long a call may wait for a leader.
const CALL: Duration = Duration::from_secs(20);
/// How long an accepted run may take after the last fault.
const END: Duration = Duration::from_secs(40);

/// Who leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    /// Which of the coordinators.
    pub index: usize,
    /// Its term.
    pub epoch: i64,
    /// What it says where it is.
    pub address: String,
}

/// How large a cluster is, and what stands between its parts.
pub struct Builder {
    members: usize,
    coordinators: usize,
    workers: usize,
    quota: Option<u64>,
    etcd: Option<Etcd>,
    s3: Option<(Vec<(String, String)>, PathBuf)>,
    prefix: String,
    etcd_by_proxies: bool,
    coordinators_by_proxies: bool,
    coordinator_arguments: Vec<String>,
    worker_arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// One etcd member, three coordinators, two workers, and nothing between them.
    #[must_use]
    pub fn new() -> Self {
        Self {
            members: 1,
            coordinators: 3,
            workers: 2,
            quota: None,
            etcd: None,
            s3: None,
            prefix: "objects".to_owned(),
            etcd_by_proxies: false,
            coordinators_by_proxies: false,
            coordinator_arguments: Vec::new(),
            worker_arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// So many etcd members.
    #[must_use]
    pub fn members(mut self, members: usize) -> Self {
        self.members = members;
        self
    }

    /// So many coordinators, `c0` and so on.
    #[must_use]
    pub fn coordinators(mut self, coordinators: usize) -> Self {
        self.coordinators = coordinators;
        self
    }

    /// So many workers, `w0` and so on, each with its name as label `name`.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// So many bytes for etcd.
    #[must_use]
    pub fn quota(mut self, bytes: u64) -> Self {
        self.quota = Some(bytes);
        self
    }

    /// On an etcd that is there already.
    #[must_use]
    pub fn on_etcd(mut self, etcd: Etcd) -> Self {
        self.members = etcd.members();
        self.etcd = Some(etcd);
        self
    }

    /// Artifacts are in a bucket, which everybody reaches at that `host:port`: the server's own, or
    /// a proxy's. The server must outlive the cluster.
    #[must_use]
    pub fn on_s3(mut self, server: &S3Server, address: &str) -> Self {
        self.s3 = Some((server.environment_by(address), server.bucket()));
        self
    }

    /// Artifacts are below this prefix of the bucket and not below `objects`. Then [`Cluster::check`]
    /// does not find them.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// Each coordinator has a proxy of its own to each etcd member: [`Cluster::to_etcd`].
    #[must_use]
    pub fn etcd_by_proxies(mut self) -> Self {
        self.etcd_by_proxies = true;
        self
    }

    /// Everybody goes to each coordinator by a proxy: [`Cluster::to_coordinator`].
    #[must_use]
    pub fn coordinators_by_proxies(mut self) -> Self {
        self.coordinators_by_proxies = true;
        self
    }

    /// More arguments for each coordinator.
    #[must_use]
    pub fn coordinator_arguments(mut self, more: &[&str]) -> Self {
        self.coordinator_arguments
            .extend(more.iter().map(|&a| a.to_owned()));
        self
    }

    /// What is silent or gone is given up after a time that a test can wait for.
    #[must_use]
    pub fn impatient(self) -> Self {
        self.coordinator_arguments(&[
            "--worker-grace",
            "1s",
            "--adoption-window",
            "1s",
            "--heartbeat-interval",
            "200ms",
        ])
    }

    /// More arguments for each worker.
    #[must_use]
    pub fn worker_arguments(mut self, more: &[&str]) -> Self {
        self.worker_arguments
            .extend(more.iter().map(|&a| a.to_owned()));
        self
    }

    /// More environment variables for everybody.
    #[must_use]
    pub fn environment(mut self, more: &[(String, String)]) -> Self {
        self.environment.extend(more.iter().cloned());
        self
    }

    /// Starts it all, and waits until every worker has a session with the leader.
    #[must_use]
    pub fn start(self) -> Cluster {
        let mut cluster = self.prepare();
        for node in cluster.coordinators.iter_mut().chain(&mut cluster.workers) {
            node.start();
        }
        cluster.wait_until_it_serves();
        cluster
    }

    /// Starts etcd only; the rest is there and does not run yet.
    #[must_use]
    pub fn prepare(self) -> Cluster {
        let root = tempfile::tempdir().unwrap();
        let etcd = match (self.etcd, self.quota) {
            (Some(etcd), _) => etcd,
            (None, Some(bytes)) => Etcd::with_quota(self.members, bytes),
            (None, None) => Etcd::start(self.members),
        };
        let nodes = root.path().join("nodes");
        let (artifacts, mut environment, above_objects) = match self.s3 {
            Some((environment, bucket)) => (
                format!("s3://{}/{}", s3::BUCKET, self.prefix),
                environment,
                bucket,
            ),
            None => {
                let objects = root.path().join("objects");
                fs::create_dir(&objects).unwrap();
                let url = format!("file://{}", objects.display());
                (url, Vec::new(), root.path().to_path_buf())
            }
        };
        environment.extend(self.environment);
        let mut to_etcd = Vec::new();
        let mut to_coordinator = Vec::new();
        let mut coordinators = Vec::new();
        let mut servers = Vec::new();
        for index in 0..self.coordinators {
            let port = processes::free_port();
            let listen = format!("127.0.0.1:{port}");
            let ways: Vec<_> = (0..self.members)
                .filter(|_| self.etcd_by_proxies)
                .map(|member| TcpProxy::start(&etcd.address(member)))
                .collect();
            let urls = match ways.as_slice() {
                [] => etcd.urls(),
                ways => (ways.iter())
                    .map(|way| format!("http://{}", way.address()))
                    .collect(),
            };
            let mut arguments = vec!["coordinator".to_owned()];
            let mut add = |name: &str, value: &str| {
                arguments.extend([name.to_owned(), value.to_owned()]);
            };
            add("--name", &format!("c{index}"));
            add("--listen", &listen);
            add("--etcd", &urls.join(","));
            add("--etcd-prefix", PREFIX);
            // The history of all keys is what is checked at the end.
            add("--etcd-compact-every", "0s");
            add("--artifacts", &artifacts);
            if self.coordinators_by_proxies {
                let proxy = TcpProxy::start(&listen);
                add("--advertise", proxy.address());
                servers.push(proxy.address().to_owned());
                to_coordinator.push(proxy);
            } else {
                servers.push(listen);
            }
            arguments.extend(self.coordinator_arguments.iter().cloned());
            let node = Node::new(&nodes, &format!("c{index}"), arguments);
            coordinators.push(node.with_environment(&environment));
            to_etcd.push(ways);
        }
        let mut cluster = Cluster {
            client: Client::new(servers.clone()),
            journal: Journal::new(&root.path().join("journal")),
            history: History::new(PREFIX),
            acknowledged: Vec::new(),
            workers: Vec::new(),
            worker_arguments: self.worker_arguments,
            environment,
            above_objects,
            servers,
            to_coordinator,
            to_etcd,
            coordinators,
            etcd,
            root,
        };
        for _ in 0..self.workers {
            cluster.add_worker();
        }
        cluster
    }
}

/// A running cluster.
pub struct Cluster {
    /// The coordinators.
    pub coordinators: Vec<Node>,
    /// The workers.
    pub workers: Vec<Node>,
    /// The way of each coordinator to each etcd member, if there are proxies.
    pub to_etcd: Vec<Vec<TcpProxy>>,
    /// The way of everybody to each coordinator, if there are proxies.
    pub to_coordinator: Vec<TcpProxy>,
    /// Where its state is.
    pub etcd: Etcd,
    /// A client.
    pub client: Client,
    /// What its tasks have written down.
    pub journal: Journal,
    /// What was ever written in etcd; see [`Cluster::read_history`].
    pub history: History,
    servers: Vec<String>,
    worker_arguments: Vec<String>,
    environment: Vec<(String, String)>,
    above_objects: PathBuf,
    acknowledged: Vec<String>,
    root: TempDir,
}

impl Cluster {
    /// The directory of all that is not in etcd.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The directory above `objects`, as [`crate::outside`] wants it.
    #[must_use]
    pub fn artifacts(&self) -> PathBuf {
        self.above_objects.clone()
    }

    /// Where the coordinators are, as clients and workers know it.
    #[must_use]
    pub fn servers(&self) -> &[String] {
        &self.servers
    }

    /// The arguments of the worker of that number, under another name or the same.
    #[must_use]
    pub fn worker_arguments(&self, name: &str, dir: &str) -> Vec<String> {
        let state = self.root.path().join("nodes").join(dir).join("state");
        let state = state.display().to_string();
        let label = format!("name={name}");
        let servers = self.servers.join(",");
        let arguments = [
            "worker",
            "--server",
            &servers,
            "--name",
            name,
            "--label",
            &label,
            "--state-dir",
            &state,
            "--slots",
            "8",
            "--cpu",
            "4",
            "--memory",
            "2GiB",
        ];
        let arguments = arguments.iter().map(|&a| a.to_owned());
        arguments.chain(self.worker_arguments.clone()).collect()
    }

    /// One worker more, which does not run yet. Gives its number.
    pub fn add_worker(&mut self) -> usize {
        self.add_worker_with(&[])
    }

    /// The same, with arguments of its own.
    pub fn add_worker_with(&mut self, more: &[&str]) -> usize {
        let name = format!("w{}", self.workers.len());
        let mut arguments = self.worker_arguments(&name, &name);
        arguments.extend(more.iter().map(|&a| a.to_owned()));
        let nodes = self.root.path().join("nodes");
        let node = Node::new(&nodes, &name, arguments);
        self.workers.push(node.with_environment(&self.environment));
        self.workers.len() - 1
    }

    /// Waits until somebody leads and every worker that runs has a session.
    ///
    /// # Panics
    /// If that takes too long, or a process ends.
    #[track_caller]
    pub fn wait_until_it_serves(&mut self) {
        for node in self.coordinators.iter_mut().filter(|n| n.runs()) {
            node.wait_for_line(" serves on ");
        }
        self.wait_for_leader();
        for node in self.workers.iter_mut().filter(|n| n.runs()) {
            node.wait_for_line(" has a session with ");
        }
    }

    /// Who leads, as etcd says.
    #[must_use]
    pub fn leader(&self) -> Option<Leader> {
        let kv = self.etcd.get(&format!("{PREFIX}/leader"))?;
        let value: Value = serde_json::from_slice(kv.value()).unwrap();
        let name = value["name"].as_str().unwrap();
        Some(Leader {
            index: name.strip_prefix('c').unwrap().parse().unwrap(),
            epoch: kv.create_revision(),
            address: value["address"].as_str().unwrap().to_owned(),
        })
    }

    /// Waits until somebody leads.
    #[track_caller]
    pub fn wait_for_leader(&self) -> Leader {
        wait_for("a leader", seconds(20), || self.leader())
    }

    /// Waits until somebody leads in a later term.
    #[track_caller]
    pub fn wait_for_leader_after(&self, epoch: i64) -> Leader {
        wait_for("another leader", seconds(20), || {
            self.leader().filter(|l| l.epoch > epoch)
        })
    }

    /// A coordinator that does not lead.
    #[must_use]
    pub fn a_follower(&self) -> usize {
        let leader = self.wait_for_leader().index;
        (0..self.coordinators.len())
            .find(|&i| i != leader && self.coordinators[i].runs())
            .unwrap()
    }

    /// A request for this pipeline, with a request id of its own.
    #[must_use]
    pub fn request(&self, pipeline: &str) -> SubmitRunRequest {
        SubmitRunRequest {
            pipeline_yaml: pipeline.to_owned(),
            file_name: "p.yaml".to_owned(),
            base_dir: self.root.path().display().to_string(),
            request_id: format!("request-{}", self.acknowledged.len()),
            trigger: "manual".to_owned(),
            ..Default::default()
        }
    }

    /// Submits until somebody accepts it, and remembers that it was acknowledged.
    ///
    /// # Panics
    /// If nobody does.
    #[track_caller]
    pub fn submit(&mut self, pipeline: &str) -> String {
        let request = self.request(pipeline);
        let run = self.client.submit(&request, CALL).unwrap();
        self.acknowledged(&run);
        run
    }

    /// This run was accepted, somehow else.
    pub fn acknowledged(&mut self, run: &str) {
        self.acknowledged.push(run.to_owned());
    }

    /// What can be seen of a run.
    ///
    /// # Panics
    /// If nobody answers.
    #[track_caller]
    #[must_use]
    pub fn run(&self, run: &str) -> GetRunResponse {
        self.client.run(run, CALL).unwrap()
    }

    /// Waits until a run has ended well.
    ///
    /// # Panics
    /// If it ends otherwise, or not.
    #[track_caller]
    pub fn succeeds(&self, run: &str) -> GetRunResponse {
        let ended = wait_for("the run ends", END, || {
            let seen = self.run(run);
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
        wait_for(&what, seconds(20), || {
            (self.journal.begun(run, task) >= attempts).then_some(())
        });
    }

    /// A run whose task `wait` runs and waits at its gate `g`.
    #[track_caller]
    pub fn gated_run(&mut self) -> String {
        let pipeline = self.journal.gated("g", "");
        let run = self.submit(&pipeline);
        self.wait_for_begin(&run, "wait", 1);
        run
    }

    /// It ends well, no task of it was begun twice, and the invariants hold.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn ends_without_a_restart(&mut self, run: &str) {
        let ended = self.succeeds(run);
        for task in &ended.tasks {
            let begun = self.journal.begun(run, &task.task);
            assert_eq!(begun, 1, "{} was restarted", task.task);
        }
        self.check();
    }

    /// The worker that runs a task, as its record in etcd says.
    ///
    /// # Panics
    /// If none does.
    #[must_use]
    pub fn worker_of(&self, run: &str, task: &str) -> usize {
        let key = format!("{PREFIX}/state/tasks/{run}/{task}");
        let record: Value = serde_json::from_slice(self.etcd.get(&key).unwrap().value()).unwrap();
        assert_eq!(record["written"], "running", "{record}");
        let name = record["worker"].as_str().unwrap();
        self.workers.iter().position(|w| w.name() == name).unwrap()
    }

    /// Reads what was written in etcd since the last time.
    pub fn read_history(&mut self) -> &History {
        self.history.read_on(&self.etcd);
        &self.history
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.coordinators.iter().chain(&self.workers) {
                node.tell();
            }
            let keys = self.etcd.keys(&format!("{PREFIX}/"));
            eprintln!("--- keys in etcd: {keys:#?}");
            if std::env::var_os("EMBERLINE_TESTS_KEEP").is_some() {
                self.root.disable_cleanup(true);
                eprintln!("--- kept: {}", self.root.path().display());
            }
        }
        for node in self.coordinators.iter_mut().chain(&mut self.workers) {
            node.kill();
        }
        // Only after a test that failed half-way is anything left here.
        for pid in processes::of_attempts_below(self.root.path()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}
