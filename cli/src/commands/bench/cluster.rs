//! A whole process, seen from the outside: how soon it is ready, what it holds while it idles.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::{Instant, timeout},
};

use super::Figure;

const READY_WITHIN: Duration = Duration::from_secs(30);
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// How long a cluster rests before its memory is read.
const REST: Duration = Duration::from_secs(2);

/// From the start of the process to the line that says that it serves, workers included.
pub(super) async fn startup(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let begun = Instant::now();
    let child = start(directory, workers, &[]).await?;
    let took = begun.elapsed();
    stop(child).await?;
    // Again, with a state that is there already.
    let begun = Instant::now();
    let child = start(directory, workers, &[]).await?;
    let again = begun.elapsed();
    stop(child).await?;
    Ok(vec![
        Figure::new("to ready, empty state", "ms", took.as_secs_f64() * 1e3),
        Figure::new("to ready again", "ms", again.as_secs_f64() * 1e3),
    ])
}

/// Resident memory of a cluster that has nothing to do.
pub(super) async fn memory(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let child = start(directory, workers, &[]).await?;
    tokio::time::sleep(REST).await;
    let (resident, anonymous) = (mib(&child, "VmRSS:")?, mib(&child, "RssAnon:")?);
    stop(child).await?;
    Ok(vec![
        Figure::new("resident", "MiB", resident),
        Figure::new("of it not files", "MiB", anonymous),
    ])
}

/// What a process holds in memory, by this field of its status, in MiB.
pub(super) fn mib(child: &Child, field: &str) -> anyhow::Result<f64> {
    let pid = child.id().context("the cluster has ended")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .context("cannot read the memory of the cluster")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.trim_end_matches("kB").trim().parse::<f64>().ok());
    Ok(kib.with_context(|| format!("`{field}` is not in the status of the process"))? / 1024.0)
}

/// A cluster as a process of its own, which exports only what this environment says; ready.
pub(super) async fn start(
    directory: &Path,
    workers: u32,
    environment: &[(&str, &str)],
) -> anyhow::Result<Child> {
    Ok(start_serving(directory, workers, environment).await?.0)
}

/// The same, and where it serves models.
pub(super) async fn start_serving(
    directory: &Path,
    workers: u32,
    environment: &[(&str, &str)],
) -> anyhow::Result<(Child, SocketAddr)> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OTEL_") {
            command.env_remove(name);
        }
    }
    let mut child = command
        .envs(environment.iter().copied())
        .arg("--state-dir")
        .arg(directory.join("state"))
        .args(["dev", "--listen", "127.0.0.1:0", "--workers"])
        .arg(workers.to_string())
        .env_remove("EMBERLINE_SERVER")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start a cluster")?;
    let stdout = child.stdout.take().context("the cluster has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    // It says so in two lines. Both are read: it must not meet a closed pipe.
    let told = timeout(READY_WITHIN, async {
        lines.next_line().await?;
        lines.next_line().await
    });
    let line = told
        .await
        .with_context(|| format!("the cluster is not ready after {READY_WITHIN:?}"))??;
    let line = line.context("the cluster ended before it was ready")?;
    let models = line.rsplit("http://").next().map(str::parse);
    let Some(Ok(models)) = models else {
        anyhow::bail!("the cluster does not say where it serves models: {line}");
    };
    Ok((child, models))
}

/// Asks it to stop, which it must do in order.
pub(super) async fn stop(mut child: Child) -> anyhow::Result<()> {
    let pid = child
        .id()
        .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?))
        .context("the cluster has ended")?;
    kill_process(pid, Signal::TERM).context("cannot stop the cluster")?;
    let status = timeout(STOP_WITHIN, child.wait())
        .await
        .with_context(|| format!("the cluster did not stop within {STOP_WITHIN:?}"))??;
    anyhow::ensure!(status.success(), "the cluster stopped with {status}");
    Ok(())
}
