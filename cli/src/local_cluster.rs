//! A whole cluster on this machine, each part a process of its own: etcd's members, coordinators,
//! workers. For what measures and harms clusters; every process is killed with it.

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use emberline_coordinator::store::etcd::{EtcdConfig, EtcdStore};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::{exit::Exit, leader_channel::LeaderChannel, security::Security};

/// How long all of it may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How many of each, and where.
pub struct Shape {
    /// Members of etcd.
    pub etcd: usize,
    /// Coordinators.
    pub coordinators: usize,
    /// Workers.
    pub workers: usize,
    /// CPUs that each worker gives to tasks.
    pub worker_cpu: u32,
    /// An absolute directory, for everything that they write.
    pub directory: PathBuf,
}

/// One process, that can be ended and started again.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Where it serves, if it does.
    pub address: String,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

/// See the module.
pub struct LocalCluster {
    /// etcd's members.
    pub etcd: Vec<Node>,
    /// The coordinators.
    pub coordinators: Vec<Node>,
    /// The workers.
    pub workers: Vec<Node>,
    config: EtcdConfig,
}

impl Node {
    /// Starts it; its output goes to its log.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("cannot write `{}`", self.log.display()))?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env_remove("EMBERLINE_SERVER")
            .env_remove("EMBERLINE_STATE_DIR")
            .env_remove("EMBERLINE_NAME")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start `{}`", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let id = self.child.as_ref().and_then(Child::id);
        let pid = id
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
            .with_context(|| format!("{} does not run", self.name))?;
        Ok(kill_process(pid, signal)?)
    }

    /// Kills it and waits until it is gone.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Asks it to stop and waits until it has.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)?;
        if let Some(mut child) = self.child.take() {
            child.wait().await?;
        }
        Ok(())
    }

    /// Whether it was started and not ended by us.
    pub const fn runs(&self) -> bool {
        self.child.is_some()
    }
}

impl LocalCluster {
    /// Starts all of it, and waits until somebody leads.
    ///
    /// # Errors
    /// What cannot be started, or is not ready in time.
    pub async fn start(shape: &Shape) -> anyhow::Result<Self> {
        let Shape { directory, .. } = shape;
        let ports = free_ports(2 * shape.etcd + shape.coordinators)?;
        let (clients, rest) = ports.split_at(shape.etcd);
        let (peers, served) = rest.split_at(shape.etcd);
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let everyone: Vec<String> = (peers.iter().enumerate())
            .map(|(n, port)| format!("etcd-{}={}", n + 1, url(port)))
            .collect();
        let mut etcd = Vec::new();
        for (n, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let name = format!("etcd-{}", n + 1);
            let data = directory.join(&name).display().to_string();
            let (client, peer) = (url(client), url(peer));
            let arguments = [
                ("--name", name.clone()),
                ("--data-dir", data),
                ("--log-level", "error".to_owned()),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client.clone()),
                ("--listen-peer-urls", peer.clone()),
                ("--initial-advertise-peer-urls", peer),
                ("--initial-cluster", everyone.join(",")),
            ];
            etcd.push(node(directory, &name, client, "etcd".into(), arguments));
        }
        let endpoints: Vec<String> = clients.iter().map(url).collect();
        let own = std::env::current_exe().context("cannot find this program")?;
        let artifacts = url::Url::from_directory_path(directory.join("objects"))
            .map_err(|()| anyhow::anyhow!("`{}` is not absolute", directory.display()))?;
        let mut coordinators = Vec::new();
        for (n, port) in served.iter().enumerate() {
            let name = format!("coordinator-{}", n + 1);
            let address = format!("127.0.0.1:{port}");
            let arguments = [
                ("coordinator", String::new()),
                ("--name", name.clone()),
                ("--listen", address.clone()),
                ("--etcd", endpoints.join(",")),
                // What is judged afterwards must not be forgotten.
                ("--etcd-compact-every", "0s".to_owned()),
                ("--artifacts", artifacts.to_string()),
            ];
            coordinators.push(node(directory, &name, address, own.clone(), arguments));
        }
        let server: Vec<String> = coordinators.iter().map(|c| c.address.clone()).collect();
        let mut workers = Vec::new();
        for n in 1..=shape.workers {
            let name = format!("worker-{n}");
            let arguments = [
                ("worker", String::new()),
                ("--name", name.clone()),
                ("--server", server.join(",")),
                ("--cpu", shape.worker_cpu.to_string()),
                ("--state-dir", directory.join(&name).display().to_string()),
            ];
            workers.push(node(
                directory,
                &name,
                String::new(),
                own.clone(),
                arguments,
            ));
        }
        let mut cluster = Self {
            etcd,
            coordinators,
            workers,
            config: EtcdConfig {
                endpoints,
                prefix: "emberline".to_owned(),
                user: None,
                tls: None,
                lease_ttl: Duration::from_secs(3),
                compact_every: None,
            },
        };
        for node in cluster.nodes() {
            node.start().map_err(|e| {
                Exit::cluster(format!(
                    "{e:#}: is etcd installed (`etcd` of Debian's `etcd-server`)?"
                ))
            })?;
        }
        cluster.ready().await?;
        Ok(cluster)
    }

    fn nodes(&mut self) -> impl Iterator<Item = &mut Node> {
        self.etcd
            .iter_mut()
            .chain(&mut self.coordinators)
            .chain(&mut self.workers)
    }

    async fn ready(&self) -> anyhow::Result<()> {
        let known = self.coordinators.iter().map(|c| c.address.clone());
        let channel = LeaderChannel::new(known.collect(), READY_WITHIN, &Security::default())
            .map_err(Exit::input)?;
        let reached = channel.reach().await;
        reached.map_err(|status| {
            let why = status.message();
            Exit::cluster(format!(
                "the cluster is not ready after {READY_WITHIN:?}: {why}"
            ))
            .into()
        })
    }

    /// A look at the cluster's state from beside its coordinators.
    pub async fn observer(&self) -> anyhow::Result<EtcdStore> {
        Ok(EtcdStore::open(self.config.clone()).await?)
    }

    /// The same etcd, another prefix: to measure etcd itself.
    pub async fn beside(&self, prefix: &str) -> anyhow::Result<EtcdStore> {
        let config = EtcdConfig {
            prefix: prefix.to_owned(),
            ..self.config.clone()
        };
        Ok(EtcdStore::open(config).await?)
    }

    /// All coordinators' addresses, as `--server` takes them.
    pub fn server(&self) -> String {
        let addresses: Vec<&str> = self
            .coordinators
            .iter()
            .map(|c| c.address.as_str())
            .collect();
        addresses.join(",")
    }

    /// Kills everything.
    pub async fn end(mut self) {
        for node in self.nodes() {
            if node.kill().await.is_err() {
                tracing::warn!(node = %node.name, "was not ended");
            }
        }
    }
}

fn node<const N: usize>(
    directory: &Path,
    name: &str,
    address: String,
    program: PathBuf,
    arguments: [(&str, String); N],
) -> Node {
    let arguments = arguments.into_iter().flat_map(|(flag, value)| {
        let value = (!value.is_empty()).then_some(value);
        std::iter::once(flag.to_owned()).chain(value)
    });
    Node {
        name: name.to_owned(),
        address,
        program,
        arguments: arguments.collect(),
        log: directory.join(format!("{name}.log")),
        child: None,
    }
}

/// Ports that nobody listened on a moment ago.
fn free_ports(number: usize) -> anyhow::Result<Vec<u16>> {
    let listeners = (0..number).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let listeners: Vec<TcpListener> = listeners.collect::<Result<_, _>>()?;
    let ports = listeners.iter().map(|l| Ok(l.local_addr()?.port()));
    ports.collect()
}
