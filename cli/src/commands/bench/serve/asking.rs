//! The load comes from a second process, the same binary as `emberline bench-ask`: what it is told, what
//! it tells, and the handle by which it is held.

use std::process::Stdio;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

/// How clients ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Protocol {
    /// With raw contents, as public clients send them.
    Grpc,
    /// With JSON.
    Rest,
}

impl Protocol {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Rest => "rest",
        }
    }
}

/// What to ask, and how: the first line of the process's standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ask {
    /// `host:port`.
    pub address: String,
    pub model: String,
    pub protocol: Protocol,
    /// Each has a connection of its own, and asks again when it has its answer.
    pub clients: usize,
    /// What each rests after an answer.
    pub rest_micros: u64,
    /// Asked before anything is measured; what fails then counts all the same.
    pub warm_millis: u64,
    /// How long it is measured; absent: until standard input ends.
    pub millis: Option<u64>,
    /// Bodies of requests as they are over REST, asked in turn.
    pub requests: Vec<Value>,
}

/// What became of the requests: the one line of its standard output.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Told {
    /// Answered while it was measured.
    pub answered: u64,
    /// For how long that was.
    pub seconds: f64,
    /// Absent if nothing was answered.
    pub p50_micros: Option<f64>,
    pub p99_micros: Option<f64>,
    /// Not answered, warm-up included.
    pub failed: u64,
    /// Why one of them was not.
    pub failure: Option<String>,
    /// The versions that have answered.
    pub versions: Vec<Seen>,
}

/// A version that has answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Seen {
    pub version: String,
    /// When it did for the first time, in microseconds since 1970.
    pub first: u64,
}

/// The process while it asks; dropped, it ends.
pub(super) struct Asking(Child);

impl Asking {
    pub(super) async fn start(ask: &Ask) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut child = Command::new(program)
            .arg("bench-ask")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the process that asks")?;
        let mut line = serde_json::to_vec(ask)?;
        line.push(b'\n');
        let stdin = child.stdin.as_mut();
        let stdin = stdin.context("the process that asks has no input")?;
        stdin.write_all(&line).await?;
        Ok(Self(child))
    }

    /// Ends its standard input, and waits for what it tells.
    pub(super) async fn end(self) -> anyhow::Result<Told> {
        let output = self.0.wait_with_output().await?;
        let status = output.status;
        anyhow::ensure!(
            status.success(),
            "the process that asks ended with {status}"
        );
        let told: Told = serde_json::from_slice(&output.stdout)
            .context("the process that asks told what cannot be read")?;
        if let Some(why) = &told.failure {
            tracing::warn!("{} requests failed: {why}", told.failed);
        }
        Ok(told)
    }
}
