//! A real etcd cluster: one process for each member, on loopback ports that stay the same over
//! restarts, with data in a directory of its own. Members are killed, paused and started again by
//! their index, and nothing of them is left when the test is over, however it ends.
//!
//! What a test reads or writes here goes by a client of the tests' own, past the system under test.
//! Start with [`Etcd::start`].

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use etcd_client::{
    AlarmAction, AlarmType, Client, CompactionOptions, ConnectOptions, DeleteOptions, Error,
    GetOptions, KeyValue, PutOptions,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::{processes, seconds, wait_for};

/// How long one request of the tests may take before it counts as unanswered.
const ANSWER: Duration = Duration::from_secs(3);

struct Member {
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

/// A running etcd cluster.
pub struct Etcd {
    root: TempDir,
    members: Vec<Member>,
    quota: Option<u64>,
    runtime: Runtime,
}

impl Etcd {
    /// Starts so many members, and waits until they have elected one of them.
    #[must_use]
    pub fn start(members: usize) -> Self {
        Self::launch(members, None)
    }

    /// The same, each with at most so many bytes (`--quota-backend-bytes`).
    #[must_use]
    pub fn with_quota(members: usize, bytes: u64) -> Self {
        Self::launch(members, Some(bytes))
    }

    fn launch(members: usize, quota: Option<u64>) -> Self {
        let mut etcd = Self::prepare(members, quota);
        etcd.run_all();
        etcd
    }

    fn prepare(members: usize, quota: Option<u64>) -> Self {
        let members = (0..members).map(|_| Member {
            client_port: processes::free_port(),
            peer_port: processes::free_port(),
            process: None,
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Self {
            root: tempfile::tempdir().unwrap(),
            members: members.collect(),
            quota,
            runtime,
        }
    }

    fn run_all(&mut self) {
        for index in 0..self.members.len() {
            self.run(index);
        }
        self.wait_until_it_answers();
    }

    /// A new cluster of so many members that begins with a snapshot, as an operator would make it.
    ///
    /// # Panics
    /// If etcd's tools do not take it.
    #[must_use]
    pub fn restored(snapshot: &Path, members: usize) -> Self {
        let mut etcd = Self::prepare(members, None);
        // From 3.6 on `etcdctl` cannot do it any more.
        let tool = match Command::new("etcdutl").arg("version").output() {
            Ok(_) => "etcdutl",
            Err(_) => "etcdctl",
        };
        for index in 0..members {
            let mut command = Command::new(tool);
            command
                .args(["snapshot", "restore"])
                .arg(snapshot)
                .args(["--name", &format!("m{index}")])
                .args(["--initial-cluster", &etcd.initial_cluster()])
                .args(["--initial-advertise-peer-urls", &etcd.peer_url(index)])
                .arg("--data-dir")
                .arg(etcd.data_dir(index));
            run_tool(command);
        }
        etcd.run_all();
        etcd
    }

    /// Saves a snapshot by etcd's own command line.
    ///
    /// # Panics
    /// If that does not take one.
    pub fn snapshot(&self, to: &Path) {
        let mut command = Command::new("etcdctl");
        command
            .args(["--endpoints", &self.address(0), "snapshot", "save"])
            .arg(to);
        run_tool(command);
    }

    fn initial_cluster(&self) -> String {
        let all = self.members.iter().enumerate();
        let urls: Vec<_> = all
            .map(|(i, m)| format!("m{i}=http://127.0.0.1:{}", m.peer_port))
            .collect();
        urls.join(",")
    }

    fn data_dir(&self, index: usize) -> PathBuf {
        self.root.path().join(format!("m{index}"))
    }

    /// Makes a cluster of its own out of one member that is left, with what it has stored: what an
    /// operator does when the others are lost for ever.
    ///
    /// # Panics
    /// If the cluster does not serve then.
    pub fn go_on_alone(&mut self, index: usize) {
        for other in 0..self.members.len() {
            self.kill(other);
        }
        self.run_with(index, &["--force-new-cluster"]);
        self.wait_until_it_answers();
    }

    fn run(&mut self, index: usize) {
        self.run_with(index, &[]);
    }

    fn run_with(&mut self, index: usize, more: &[&str]) {
        let initial = self.initial_cluster();
        let (client, peer) = (self.url(index), self.peer_url(index));
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file(index))
            .unwrap();
        let mut command = processes::ends_with_the_test("etcd");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ETCD_") {
                command.env_remove(name);
            }
        }
        command
            .args(["--name", &format!("m{index}")])
            .arg("--data-dir")
            .arg(self.data_dir(index))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &initial])
            .args(["--initial-cluster-state", "new"])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(["--logger", "zap", "--log-level", "warn"])
            .args(["--log-outputs", "stderr"])
            .args(more);
        if let Some(bytes) = self.quota {
            command.args(["--quota-backend-bytes", &bytes.to_string()]);
        }
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| {
                panic!("cannot start etcd: {e}; `./ci.sh` installs it (package etcd-server)")
            });
        self.members[index].process = Some(process);
    }

    fn log_file(&self, index: usize) -> PathBuf {
        self.root.path().join(format!("m{index}.log"))
    }

    /// What a member has written to its log.
    #[must_use]
    pub fn log(&self, index: usize) -> String {
        fs::read_to_string(self.log_file(index)).unwrap_or_default()
    }

    /// How many members there are.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// `host:port` of a member, for clients.
    #[must_use]
    pub fn address(&self, index: usize) -> String {
        format!("127.0.0.1:{}", self.members[index].client_port)
    }

    /// The URL of a member, for clients.
    #[must_use]
    pub fn url(&self, index: usize) -> String {
        format!("http://{}", self.address(index))
    }

    /// The URL of a member, for its peers.
    #[must_use]
    pub fn peer_url(&self, index: usize) -> String {
        format!("http://127.0.0.1:{}", self.members[index].peer_port)
    }

    /// The URLs of all members, for clients.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        (0..self.members.len()).map(|i| self.url(i)).collect()
    }

    /// Kills a member as a power cut would.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts a member again, with what it had stored.
    pub fn restart(&mut self, index: usize) {
        self.kill(index);
        self.run(index);
    }

    /// Stops a member from running, without closing anything, until [`Self::go_on`].
    pub fn pause(&self, index: usize) {
        self.signal(index, Signal::STOP);
    }

    /// Lets a member run again.
    pub fn go_on(&self, index: usize) {
        self.signal(index, Signal::CONT);
    }

    fn signal(&self, index: usize, signal: Signal) {
        let process = self.members[index].process.as_ref();
        kill_process(Pid::from_child(process.expect("the member runs")), signal).unwrap();
    }

    /// The member that leads etcd itself. `None` while the members that answer agree on none.
    #[must_use]
    pub fn leader(&self) -> Option<usize> {
        let mut found = None;
        for index in 0..self.members.len() {
            let status = self.block_on_one(index, async |mut client| client.status().await);
            let Ok(status) = status else { continue };
            if status.leader() == status.header().unwrap().member_id() {
                // Two of them say so only while one has not noticed yet.
                if found.replace(index).is_some() {
                    return None;
                }
            }
        }
        found
    }

    /// Waits until a write is taken.
    ///
    /// # Panics
    /// If none is within 20 s.
    pub fn wait_until_it_answers(&self) {
        wait_for("etcd answers", seconds(20), || {
            self.block_on(async |mut client| client.get("-", None).await)
                .ok()
        });
    }

    /// Does something with a client of all members; what takes longer than some seconds is an error.
    ///
    /// # Errors
    /// Of etcd, or that it did not answer.
    pub fn block_on<T>(
        &self,
        call: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        // Only members that run: a balancer asks any of its endpoints.
        let running = self.members.iter().filter(|m| m.process.is_some());
        let urls = running.map(|m| format!("http://127.0.0.1:{}", m.client_port));
        self.call(urls.collect(), call)
    }

    fn block_on_one<T>(
        &self,
        index: usize,
        call: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.call(vec![self.url(index)], call)
    }

    fn call<T>(
        &self,
        urls: Vec<String>,
        call: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let answer = async {
            let options = ConnectOptions::new()
                .with_connect_timeout(Duration::from_secs(1))
                .with_timeout(ANSWER);
            call(Client::connect(urls, Some(options)).await?).await
        };
        self.runtime
            .block_on(async { tokio::time::timeout(ANSWER, answer).await })
            .unwrap_or_else(|_| Err(Error::Internal(format!("no answer within {ANSWER:?}"))))
    }

    /// The value of a key, if etcd answers and has it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<KeyValue> {
        let mut answer = self
            .block_on(async |mut client| client.get(key, None).await)
            .ok()?;
        answer.take_kvs().pop()
    }

    /// All keys with a prefix, if etcd answers.
    #[must_use]
    pub fn keys(&self, prefix: &str) -> Option<Vec<String>> {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let answer = self
            .block_on(async |mut client| client.get(prefix, Some(options)).await)
            .ok()?;
        let keys = answer.kvs().iter();
        Some(keys.map(|kv| kv.key_str().unwrap().to_owned()).collect())
    }

    /// Writes a key.
    ///
    /// # Errors
    /// Of etcd, or that it did not answer.
    pub fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<(), Error> {
        let value = value.into();
        self.block_on(async |mut client| client.put(key, value, None::<PutOptions>).await)
            .map(drop)
    }

    /// Deletes every key with a prefix.
    ///
    /// # Panics
    /// If etcd refuses that.
    pub fn delete(&self, prefix: &str) {
        let options = DeleteOptions::new().with_prefix();
        self.block_on(async |mut client| client.delete(prefix, Some(options)).await)
            .unwrap();
    }

    /// How many leases there are, of anybody.
    #[must_use]
    pub fn leases(&self) -> Option<usize> {
        let answer = self.block_on(async |mut client| client.leases().await);
        Some(answer.ok()?.leases().len())
    }

    /// Writes under keys of its own until the quota is used up, so that etcd takes no write of
    /// anybody (alarm `NOSPACE`).
    ///
    /// # Panics
    /// If there is no quota, or it is too large for a test.
    pub fn fill(&self) {
        assert!(self.quota.is_some(), "start it with a quota");
        for n in 0..1_000 {
            let put = self.put(&format!("-junk/{n}"), vec![b'.'; 1 << 20]);
            if put.is_err_and(|e| e.to_string().contains("space")) {
                return;
            }
        }
        panic!("etcd took everything");
    }

    /// What an operator does against `NOSPACE`: away with what fills it, compact, defragment each
    /// member, disarm. What was written up to a revision can be read for the last time by
    /// `last_look`, which is told the revision.
    ///
    /// # Panics
    /// If etcd refuses that.
    pub fn make_room(&self, last_look: impl FnOnce(i64)) {
        self.delete("-junk/");
        self.compact(last_look);
        for index in 0..self.members.len() {
            self.block_on_one(index, async |mut client| client.defragment().await)
                .unwrap();
        }
        self.block_on(async |mut client| {
            let alarms = client
                .alarm(AlarmAction::Get, AlarmType::Nospace, None)
                .await?;
            for alarm in alarms.alarms() {
                let mut options = etcd_client::AlarmOptions::new();
                options.with_member(alarm.member_id());
                client
                    .alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options))
                    .await?;
            }
            Ok(())
        })
        .unwrap();
    }

    /// Lets etcd forget all earlier versions of all keys. They can be read for the last time by
    /// `last_look`, which is told the revision.
    ///
    /// # Panics
    /// If etcd refuses that.
    pub fn compact(&self, last_look: impl FnOnce(i64)) {
        let revision = self.revision();
        last_look(revision);
        let physical = CompactionOptions::new().with_physical();
        self.block_on(async |mut client| client.compact(revision, Some(physical)).await)
            .unwrap();
    }

    /// The latest revision.
    ///
    /// # Panics
    /// If etcd does not answer.
    #[must_use]
    pub fn revision(&self) -> i64 {
        let answer = self.block_on(async |mut client| client.get("-", None).await);
        answer.unwrap().header().unwrap().revision()
    }
}

/// Runs one of etcd's tools, which must succeed.
#[track_caller]
fn run_tool(mut command: Command) {
    command.env("ETCDCTL_API", "3");
    let output = command.output().unwrap_or_else(|e| {
        panic!("cannot start {command:?}: {e}; `./ci.sh` installs it (package etcd-client)")
    });
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}");
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            if std::thread::panicking() {
                let log = self.log(index);
                let from = log.len().saturating_sub(600);
                let tail = String::from_utf8_lossy(&log.as_bytes()[from..]);
                eprintln!("--- end of the log of etcd m{index}\n{tail}");
            }
            if let Some(mut process) = self.members[index].process.take() {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_member_comes_back_with_what_it_had() {
        let mut etcd = Etcd::start(1);
        etcd.put("a", "1").unwrap();
        let revision = etcd.get("a").unwrap().mod_revision();
        etcd.kill(0);
        assert!(etcd.get("a").is_none());
        etcd.restart(0);
        etcd.wait_until_it_answers();
        let found = etcd.get("a").unwrap();
        assert_eq!((found.value(), found.mod_revision()), (&b"1"[..], revision));
        assert_eq!(etcd.keys("").unwrap(), ["a"]);
    }

    #[test]
    fn three_members_go_on_without_one_and_stand_still_without_two() {
        let mut etcd = Etcd::start(3);
        let leader = wait_for("a leader of etcd", seconds(10), || etcd.leader());
        etcd.kill(leader);
        wait_for("a write without the leader", seconds(10), || {
            etcd.put("a", "1").ok()
        });
        let second = wait_for("another leader", seconds(10), || etcd.leader());
        assert_ne!(second, leader);
        etcd.pause(second);
        assert!(etcd.put("a", "2").is_err(), "one of three has no quorum");
        etcd.go_on(second);
        wait_for("a write with two again", seconds(10), || {
            etcd.put("a", "3").ok()
        });
        etcd.restart(leader);
        // A member that comes back may bring about another election.
        let found = wait_for("the last write", seconds(10), || etcd.get("a"));
        assert_eq!(found.value(), b"3");
    }

    #[test]
    fn a_full_etcd_refuses_writes_until_there_is_room() {
        let etcd = Etcd::with_quota(1, 8 << 20);
        etcd.put("a", "1").unwrap();
        etcd.fill();
        let refused = etcd.put("a", "2").unwrap_err().to_string();
        assert!(refused.contains("database space exceeded"), "{refused}");
        etcd.make_room(|_| ());
        etcd.put("a", "3").unwrap();
        assert_eq!(etcd.keys("").unwrap(), ["a"]);
    }

    #[test]
    fn nothing_is_left_of_it() {
        let etcd = Etcd::start(1);
        let process = etcd.members[0].process.as_ref().unwrap().id();
        let root = etcd.root.path().to_path_buf();
        assert!(processes::is_alive(process.cast_signed()));
        drop(etcd);
        assert!(!processes::is_alive(process.cast_signed()));
        assert!(!root.exists());
    }
}
