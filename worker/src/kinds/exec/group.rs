//! The processes of one command: its group, and whatever of it has left the group.
//!
//! A process that makes a session of its own (a daemon) is no longer in the group, but still has
//! the mark in its environment that it was started with; both are looked for.

use std::{fs, path::Path, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
};

use crate::stage::StageError;

/// The environment variable that marks every process of an attempt: its value is a path in the
/// attempt's own directory, which no other attempt of any worker on this machine has.
pub(super) const MARK: &str = "EMBERLINE_RESULTS";
/// How long a group is killed again and again: one that forks may be a step ahead.
const KILL_FOR: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Group {
    id: Pid,
    mark: Vec<u8>,
}

/// A process that ends the group when the worker dies: it holds the other end of a pipe.
pub(super) struct Guard(Child);

impl Group {
    /// Of a command that was started in a group of its own.
    pub fn of(child: &Child, results: &Path) -> Result<Self, StageError> {
        let id = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw)
            .ok_or_else(|| StageError::system("the command has no process id"))?;
        Ok(Self {
            id,
            mark: [
                MARK.as_bytes(),
                b"=",
                results.as_os_str().as_encoded_bytes(),
            ]
            .concat(),
        })
    }

    /// Starts a process outside the group that ends the group when this program is gone, however
    /// it went. Without a shell on this machine there is none; then only orderly ends are covered.
    pub async fn guard(&self) -> Option<Guard> {
        // No `--` before the group: dash, which is `sh` on Debian and Ubuntu, knows none.
        let script = r#"read -r word; [ "$word" = done ] || kill -KILL "-$1" 2>/dev/null"#;
        let started = Command::new("/bin/sh")
            .args([
                "-c",
                script,
                "emberline-guard",
                &self.id.as_raw_nonzero().to_string(),
            ])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn();
        match started {
            Ok(child) => Some(Guard(child)),
            Err(error) => {
                tracing::warn!(%error, "no guard: a command would outlive a killed worker");
                None
            }
        }
    }

    /// Asks every process of the group to end.
    pub fn terminate(&self) {
        // A group that is gone already is as good.
        let _ = kill_process_group(self.id, Signal::TERM);
    }

    /// Ends every process of the group, and waits until none is left.
    pub async fn kill(&self) {
        let deadline = tokio::time::Instant::now() + KILL_FOR;
        let mut wait = Duration::from_millis(1);
        loop {
            let _ = kill_process_group(self.id, Signal::KILL);
            let left = self.members().await;
            if left.is_empty() {
                return;
            }
            for member in &left {
                if let Some(pid) = Pid::from_raw(member.pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            if tokio::time::Instant::now() >= deadline {
                tracing::error!(
                    left = left.len(),
                    "processes of a command could not be ended"
                );
                return;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_millis(50));
        }
    }

    /// Memory that the group's processes hold, in bytes.
    pub async fn memory(&self) -> u64 {
        self.members()
            .await
            .iter()
            .map(|member| member.resident)
            .sum()
    }

    async fn members(&self) -> Vec<Member> {
        let (group, mark) = (self.id.as_raw_nonzero().get(), self.mark.clone());
        tokio::task::spawn_blocking(move || members(group, &mark))
            .await
            .unwrap_or_default()
    }
}

impl Guard {
    /// Lets the guard go without doing anything.
    pub async fn release(mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            // If it is gone, there is nothing to release.
            let _ = stdin.write_all(b"done\n").await;
        }
        let _ = self.0.wait().await;
    }
}

/// Ends what the commands of an earlier life of this worker have left running: the guard of a group
/// does not reach processes that have left it. `work_dir` is where attempts have their directories.
pub(crate) fn end_leftovers(work_dir: &Path) {
    let mut mark = [
        MARK.as_bytes(),
        b"=",
        work_dir.as_os_str().as_encoded_bytes(),
    ]
    .concat();
    mark.push(b'/');
    let marked = |pid: &i32| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|env| env.split(|b| *b == 0).any(|v| v.starts_with(&mark)))
    };
    for pid in pids().filter(marked).filter_map(Pid::from_raw) {
        tracing::warn!(
            pid = pid.as_raw_nonzero(),
            "ending a process that an earlier attempt left"
        );
        // If it is gone already, all the better.
        let _ = kill_process(pid, Signal::KILL);
    }
}

struct Member {
    pid: i32,
    /// In bytes.
    resident: u64,
}

/// Every process of this machine.
fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Every living process that is in the group or has the mark.
fn members(group: i32, mark: &[u8]) -> Vec<Member> {
    pids()
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name before it may have spaces and brackets of its own.
            let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
            let (state, its_group) = (fields.first()?, fields.get(2)?);
            if matches!(*state, "Z" | "X") {
                return None;
            }
            let is_member = its_group.parse() == Ok(group)
                || fs::read(format!("/proc/{pid}/environ"))
                    .is_ok_and(|env| env.split(|b| *b == 0).any(|variable| variable == mark));
            is_member.then(|| Member {
                pid,
                resident: resident(pid).unwrap_or(0),
            })
        })
        .collect()
}

fn resident(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(
        kib.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()?
            * 1024,
    )
}
