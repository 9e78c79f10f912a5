//! A cluster whose parts show certificates and tokens: made by the binary itself, as its users do.

use std::{fs, path::PathBuf};

use serde_json::Value;

use crate::{
    Call, Etcd, Output, Place, cluster::PREFIX, node::Node, pipelines::Journal, processes, seconds,
    wait_for,
};

/// The cluster: etcd, two coordinators, and the workers that are started.
pub struct Secured {
    /// Where everything is: certificates in `certs`, tokens in `NAME.token`.
    pub place: Place,
    /// The state.
    pub etcd: Etcd,
    /// `c0` and `c1`.
    pub coordinators: Vec<Node>,
    /// What tasks have written down.
    pub journal: Journal,
    servers: Vec<String>,
}

/// The tokens that are valid from the start, with their roles.
const TOKENS: [(&str, &str); 4] = [
    ("root", "admin"),
    ("hands", "operator"),
    ("eyes", "viewer"),
    ("join", "worker"),
];

impl Default for Secured {
    fn default() -> Self {
        Self::start()
    }
}

impl Secured {
    /// Starts it, without workers; waits until somebody leads.
    #[must_use]
    pub fn start() -> Self {
        let place = Place::new();
        let certs = [
            "certs",
            "make",
            "certs",
            "--coordinator",
            "c0",
            "--coordinator",
            "c1",
            "--worker",
            "w0",
            "--workers",
            "fleet",
            "--client",
            "admin",
            "--other",
            "etcd",
        ];
        place.emberline(&certs).run().expect_code(0);
        for (name, role) in TOKENS {
            let to = format!("{name}.token");
            let generate = ["tokens", "generate", name, "--role", role, "--to", &to];
            let all = [&generate[..], &["--hashes", "hashes"]].concat();
            place.emberline(&all).run().expect_code(0);
        }
        fs::create_dir(place.path("objects")).unwrap();
        let etcd = Etcd::start(1);
        let mut coordinators = Vec::new();
        let mut servers = Vec::new();
        for name in ["c0", "c1"] {
            let listen = format!("127.0.0.1:{}", processes::free_port());
            let artifacts = format!("file://{}", place.path("objects").display());
            let urls = etcd.urls().join(",");
            let (hashes, audit) = (place.path("hashes"), place.path(&format!("{name}.audit")));
            let arguments = [
                "coordinator",
                "--name",
                name,
                "--listen",
                &listen,
                "--etcd",
                &urls,
                "--etcd-prefix",
                PREFIX,
                "--artifacts",
                &artifacts,
                "--tokens-file",
                hashes.to_str().unwrap(),
                "--audit-log",
                audit.to_str().unwrap(),
                "--worker-grace",
                "1s",
                "--adoption-window",
                "1s",
                "--heartbeat-interval",
                "200ms",
            ];
            let arguments = arguments.map(str::to_owned).to_vec();
            let node = Node::new(&place.path("nodes"), name, arguments);
            let mut node = node.with_environment(&identity(&place, name));
            node.start();
            coordinators.push(node);
            servers.push(listen);
        }
        let journal = Journal::new(&place.path("journal"));
        let cluster = Self {
            place,
            etcd,
            coordinators,
            journal,
            servers,
        };
        let _ = cluster.wait_for_leader();
        cluster
    }

    /// Where the coordinators are.
    #[must_use]
    pub fn servers(&self) -> String {
        self.servers.join(",")
    }

    /// Which of the coordinators leads.
    #[must_use]
    pub fn wait_for_leader(&self) -> usize {
        wait_for("a leader", seconds(30), || {
            let status = self
                .call("root", &["cluster", "status", "-o", "json"])
                .run();
            let leader = (status.code == Some(0)).then(|| status.json()["leader"].clone())?;
            self.servers.iter().position(|server| *server == leader)
        })
    }

    /// A worker that shows that certificate and that token; it does not run yet.
    #[must_use]
    pub fn worker(&self, name: &str, certificate: &str, token: &str) -> Node {
        self.worker_with(name, certificate, token, &[])
    }

    /// The same with more arguments.
    #[must_use]
    pub fn worker_with(&self, name: &str, certificate: &str, token: &str, more: &[&str]) -> Node {
        let state = self.place.path("nodes").join(name).join("state");
        let token = self.place.path(&format!("{token}.token"));
        let servers = self.servers();
        let metrics = format!("127.0.0.1:{}", processes::free_port());
        let arguments = [
            "worker",
            "--server",
            &servers,
            "--name",
            name,
            "--state-dir",
            state.to_str().unwrap(),
            "--slots",
            "4",
            "--cpu",
            "4",
            "--memory",
            "1GiB",
            "--token-file",
            token.to_str().unwrap(),
            "--metrics-listen",
            &metrics,
        ];
        let arguments = [&arguments[..], more].concat();
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        let node = Node::new(&self.place.path("nodes"), name, arguments);
        node.with_environment(&identity(&self.place, certificate))
    }

    /// A command that shows the administrator's certificate and that token.
    #[must_use]
    pub fn call(&self, token: &str, arguments: &[&str]) -> Call {
        let token = self.place.path(&format!("{token}.token"));
        let call = self.bare(arguments).envs(&identity(&self.place, "admin"));
        call.env("EMBERLINE_TOKEN_FILE", token)
    }

    /// A command that shows nothing.
    #[must_use]
    pub fn bare(&self, arguments: &[&str]) -> Call {
        let servers = self.servers();
        let all = [
            &["--server", &servers, "--connect-timeout", "5s"],
            arguments,
        ]
        .concat();
        self.place.emberline(&all).within(seconds(60))
    }

    /// Submits a pipeline with one task, as that token.
    #[must_use]
    pub fn submit(&self, token: &str) -> Output {
        let pipeline = self.journal.chains(1, 1);
        self.place.write("one.yaml", pipeline);
        self.call(token, &["submit", "one.yaml", "-o", "json"])
            .run()
    }

    /// Waits until a run has succeeded.
    #[track_caller]
    pub fn succeeds(&self, run: &str) {
        wait_for("the run's success", seconds(60), || {
            let shown = self
                .call("eyes", &["runs", "show", run, "-o", "json"])
                .run();
            (shown.code == Some(0))
                .then(|| shown.json())
                .filter(|shown| shown["state"] == "succeeded")
        });
    }

    /// Everything that was noted of who changed what.
    #[must_use]
    pub fn audit(&self) -> Vec<Value> {
        let files = ["c0.audit", "c1.audit"].map(|name| self.place.path(name));
        let text: String = files
            .iter()
            .filter_map(|f| fs::read_to_string(f).ok())
            .collect();
        let mut all: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        all.sort_by_key(|entry| entry["at"].as_str().unwrap().to_owned());
        all
    }

    /// The names of the workers that are connected.
    #[must_use]
    pub fn workers(&self) -> Vec<String> {
        let listed = self.call("eyes", &["workers", "list", "-o", "json"]).run();
        if listed.code != Some(0) {
            return Vec::new();
        }
        let listed = listed.json();
        let listed = listed.as_array().unwrap().iter();
        listed
            .filter(|worker| worker["state"] == "connected")
            .map(|worker| worker["worker"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Waits until a worker is connected, or is not.
    #[track_caller]
    pub fn wait_for_worker(&self, name: &str, there: bool) {
        wait_for(&format!("{name} connected: {there}"), seconds(30), || {
            (self.workers().iter().any(|worker| worker == name) == there).then_some(())
        });
    }

    /// A token's text.
    #[must_use]
    pub fn token(&self, name: &str) -> String {
        let path = self.place.path(&format!("{name}.token"));
        fs::read_to_string(path).unwrap().trim().to_owned()
    }
}

/// The variables that name the certificate of one of the cluster.
#[must_use]
pub fn identity(place: &Place, name: &str) -> Vec<(String, String)> {
    let file = |name: &str| -> PathBuf { place.path(name) };
    let own = |what: &str| file(&format!("certs/{name}/{what}.pem"));
    [
        ("CA", own("ca")),
        ("CERT", own("cert")),
        ("KEY", own("key")),
    ]
    .map(|(what, path)| (format!("EMBERLINE_TLS_{what}"), path.display().to_string()))
    .to_vec()
}
