//! `doctor`: looks at what a cluster stands on, and says what to fix. It only asks and measures;
//! what it writes (one file, a few objects) it removes again.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use emberline_common::{
    artifact::ArtifactStore,
    finding::{Finding, Health},
    time::Timestamp,
};
use emberline_coordinator::store::etcd::examine;
use emberline_proto::v1::{
    GetClusterStatusRequest, GetClusterStatusResponse, cluster_service_client::ClusterServiceClient,
};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    args::{ClusterArguments, DoctorArguments, Format},
    exit::{Exit, RUN_FAILED},
    output::{self, bytes},
    security::Security,
};

/// Less than this on the disk, and nothing can go on.
const LEAST_FREE: u64 = 256 << 20;
/// An fsync that takes longer slows every commit and every artifact.
const SLOW_FSYNC: Duration = Duration::from_millis(20);
/// One operation of the object store that takes longer slows every stage.
const SLOW_STORE: Duration = Duration::from_secs(2);
/// S3 refuses requests from a clock that is 15 minutes away.
const WORST_CLOCK: i64 = 10 * 60;
/// Beyond this, times in logs of different machines no longer compare.
const BAD_CLOCK: i64 = 2;
/// How long a coordinator may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Looks at everything that the arguments name.
pub async fn doctor(
    cluster: &ClusterArguments,
    arguments: &DoctorArguments,
    format: Format,
) -> anyhow::Result<()> {
    let mut findings = disk(&cluster.state_dir, cluster.cache_size.0).await;
    if let Some(url) = &arguments.artifacts {
        findings.extend(storage(url).await);
    }
    if !arguments.etcd.is_empty() {
        findings.extend(etcd(arguments).await?);
    }
    if let Some(servers) = &cluster.server {
        let security = cluster.security.read()?;
        findings.extend(coordinators(servers, &security).await);
    }
    let failed = findings.iter().any(|f| f.health == Health::Fail);
    match format {
        Format::Json => output::json(&json!({"ok": !failed, "findings": findings}))?,
        Format::Text => print(&findings)?,
    }
    if failed {
        return Err(Exit::silent(RUN_FAILED).into());
    }
    Ok(())
}

fn print(findings: &[Finding]) -> anyhow::Result<()> {
    let rows: Vec<Vec<String>> = findings
        .iter()
        .map(|f| {
            let state = f.health.as_str().to_owned();
            vec![f.what.clone(), state, f.detail.clone()]
        })
        .collect();
    output::table(&["CHECK", "STATE", "DETAIL"], &rows)?;
    let mut is_first = true;
    for finding in findings {
        if let Some(fix) = &finding.fix {
            if std::mem::take(&mut is_first) {
                output::line("")?;
            }
            output::line(output::clean(&format!("{}: {fix}", finding.what)))?;
        }
    }
    Ok(())
}

// ---- The disk ----

/// The disk below the state directory.
async fn disk(state_dir: &Path, cache_size: u64) -> Vec<Finding> {
    let dir = state_dir.to_owned();
    let looked = tokio::task::spawn_blocking(move || look_at_disk(&dir, cache_size)).await;
    looked.unwrap_or_else(|e| vec![Finding::fail("disk", e.to_string(), "run it again")])
}

fn look_at_disk(state_dir: &Path, cache_size: u64) -> Vec<Finding> {
    let shown = state_dir.display();
    // A directory that is not there yet will be made in the nearest one that is.
    let absolute = std::path::absolute(state_dir).unwrap_or_else(|_| state_dir.to_owned());
    let Some(there) = absolute.ancestors().find(|dir| dir.is_dir()) else {
        let fix = "name another directory by --state-dir";
        return vec![Finding::fail("disk", format!("`{shown}` is nowhere"), fix)];
    };
    vec![space(there, cache_size), fsync(there)]
}

fn space(dir: &Path, cache_size: u64) -> Finding {
    let what = "disk: space";
    let shown = dir.display();
    let free = match rustix::fs::statvfs(dir) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
        Err(e) => {
            let fix = "look at the disk";
            return Finding::fail(what, format!("cannot look at `{shown}`: {e}"), fix);
        }
    };
    let detail = format!("{} free at `{shown}`", bytes(free));
    if free < LEAST_FREE {
        Finding::fail(what, detail, "free some space, or name another --state-dir")
    } else if free < cache_size {
        let fix = format!(
            "the cache may grow to {}: free some space, or set --cache-size",
            bytes(cache_size)
        );
        Finding::warn(what, detail, fix)
    } else {
        Finding::ok(what, detail)
    }
}

fn fsync(dir: &Path) -> Finding {
    let what = "disk: fsync";
    let path = dir.join(format!(".emberline-doctor-{}", std::process::id()));
    let measured = measure_fsync(&path);
    // Only there if it could be made.
    let _ = std::fs::remove_file(&path);
    match measured {
        Err(e) => Finding::fail(
            what,
            format!("cannot write to `{}`: {e}", dir.display()),
            "give this user the right to write there, or name another --state-dir",
        ),
        Ok(took) => {
            let detail = format!("{:.1} ms for 4 KiB", took.as_secs_f64() * 1000.0);
            if took > SLOW_FSYNC {
                Finding::warn(what, detail, "use a faster disk, or one that is less busy")
            } else {
                Finding::ok(what, detail)
            }
        }
    }
}

/// The median of a few.
fn measure_fsync(path: &PathBuf) -> std::io::Result<Duration> {
    let mut file = std::fs::File::create(path)?;
    let mut times = Vec::new();
    for _ in 0..11 {
        let start = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

// ---- The object store ----

async fn storage(url: &str) -> Vec<Finding> {
    let probed = async { ArtifactStore::open(url)?.probe().await };
    let probe = match probed.await {
        Ok(probe) => probe,
        Err(e) => {
            let fix = "correct --artifacts or the AWS_… variables";
            return vec![Finding::fail("artifacts", e.to_string(), fix)];
        }
    };
    let mut findings: Vec<Finding> = probe
        .steps
        .into_iter()
        .map(|step| {
            let what = format!("artifacts: {}", step.what);
            let took = format!("{:.1} ms", step.took.as_secs_f64() * 1000.0);
            match step.outcome {
                Err(why) => {
                    let fix = why
                        .advice
                        .unwrap_or_else(|| format!("look at the log of {url}"));
                    Finding::fail(what, format!("{} ({took})", why.cause), fix)
                }
                Ok(found) if step.took > SLOW_STORE => Finding::warn(
                    what,
                    format!("{took}, {found}"),
                    "look at the load of the server, and at the way to it",
                ),
                Ok(found) => Finding::ok(what, format!("{took}, {found}")),
            }
        })
        .collect();
    if let Some(ahead) = probe.server_ahead_seconds {
        findings.push(clock("clock: object store", ahead));
    }
    findings
}

/// Another machine's clock is so many seconds ahead of this one's.
fn clock(what: &str, ahead: i64) -> Finding {
    let detail = match ahead {
        0 => "agrees with this machine's".to_owned(),
        s if s > 0 => format!("{s} s ahead of this machine's"),
        s => format!("{} s behind this machine's", -s),
    };
    let fix = "set the time on both machines, e.g. by NTP";
    match ahead.abs() {
        a if a > WORST_CLOCK => Finding::fail(what, detail, fix),
        a if a > BAD_CLOCK => Finding::warn(what, detail, fix),
        _ => Finding::ok(what, detail),
    }
}

// ---- etcd ----

async fn etcd(arguments: &DoctorArguments) -> anyhow::Result<Vec<Finding>> {
    let access = &arguments.etcd_access;
    // Nobody leads by this, so there is neither a lease nor a compaction.
    let config = super::coordinator::etcd(&arguments.etcd, access, Duration::ZERO, Duration::ZERO)?;
    examine(&config)
        .await
        .map_err(|e| Exit::input(e.to_string()).into())
}

// ---- The coordinators ----

/// What one of them said.
enum Coordinator {
    Leads(Box<GetClusterStatusResponse>),
    /// With the leader's address, if it knows one.
    Follows(Option<String>, String),
    Fails(String),
}

async fn coordinators(servers: &str, security: &Security) -> Vec<Finding> {
    let names = servers.split(',').map(str::trim).filter(|s| !s.is_empty());
    let asked = names.map(|server| async move { (server, ask(server, security).await) });
    let answers = futures::future::join_all(asked).await;
    let mut findings: Vec<Finding> = answers
        .iter()
        .flat_map(|(server, answer)| describe(server, answer))
        .collect();
    findings.push(leadership(&answers));
    findings
}

async fn ask(server: &str, security: &Security) -> Coordinator {
    let endpoint = match security.dialer.endpoint(server) {
        Ok(endpoint) => endpoint.connect_timeout(ANSWER_WITHIN),
        Err(why) => return Coordinator::Fails(why),
    };
    let channel = match security.dialer.connect(&endpoint).await {
        Ok(channel) => channel,
        Err(e) => {
            let mut cause: &dyn std::error::Error = &e;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            return Coordinator::Fails(format!("cannot be reached: {cause}"));
        }
    };
    let mut client = ClusterServiceClient::new(channel);
    let answer = client.get_cluster_status(security.request(GetClusterStatusRequest {}));
    match tokio::time::timeout(ANSWER_WITHIN, answer).await {
        Ok(Ok(answer)) => Coordinator::Leads(Box::new(answer.into_inner())),
        Ok(Err(status)) => refused(&status),
        Err(_) => Coordinator::Fails(format!("does not answer within {ANSWER_WITHIN:?}")),
    }
}

fn refused(status: &Status) -> Coordinator {
    let info = status.get_details_error_info();
    match info {
        Some(info) if status.code() == Code::Unavailable && info.reason == "NOT_LEADER" => {
            let leader = info.metadata.get("leader").filter(|l| !l.is_empty());
            Coordinator::Follows(leader.cloned(), status.message().to_owned())
        }
        _ => Coordinator::Fails(format!("answers {:?}: {}", status.code(), status.message())),
    }
}

fn describe(server: &str, answer: &Coordinator) -> Vec<Finding> {
    let what = format!("coordinator {server}");
    match answer {
        Coordinator::Fails(why) => vec![Finding::fail(
            what,
            why,
            "start it, or correct --server, and look at what is between",
        )],
        Coordinator::Follows(Some(leader), _) => {
            vec![Finding::ok(what, format!("follows {leader}"))]
        }
        Coordinator::Follows(None, why) => vec![Finding::warn(
            what,
            format!("follows nobody: {why}"),
            "look at etcd: without its quorum nobody can lead",
        )],
        Coordinator::Leads(status) => {
            let ours = env!("CARGO_PKG_VERSION");
            let detail = format!(
                "leads term {}, version {}, {} workers",
                status.epoch,
                status.version,
                status.workers.len()
            );
            let mut out = vec![Finding::ok(what, detail)];
            let others = status.workers.iter().map(|w| (&w.worker, &w.version));
            let leader = [(&status.leader, &status.version)];
            for (name, version) in leader.into_iter().chain(others) {
                if version != ours {
                    out.push(Finding::warn(
                        format!("version of {name}"),
                        format!("{version}; this program is {ours}"),
                        "bring all to one version",
                    ));
                }
            }
            // A term cannot have begun in the future.
            if let Some(since) = &status.leader_since {
                let now = i64::try_from(Timestamp::now().0 / 1_000_000).unwrap_or(i64::MAX);
                if since.seconds - now > BAD_CLOCK {
                    out.push(clock(&format!("clock: {server}"), since.seconds - now));
                }
            }
            out
        }
    }
}

/// All of them together.
fn leadership(answers: &[(&str, Coordinator)]) -> Finding {
    let what = "leadership";
    let leaders: Vec<(&str, u64)> = answers
        .iter()
        .filter_map(|(server, answer)| match answer {
            Coordinator::Leads(status) => Some((*server, status.epoch)),
            _ => None,
        })
        .collect();
    let named = answers.iter().find_map(|(_, answer)| match answer {
        Coordinator::Follows(leader, _) => leader.as_deref(),
        _ => None,
    });
    match (&leaders[..], named) {
        ([(server, epoch)], _) => Finding::ok(what, format!("{server} leads term {epoch}")),
        ([], Some(leader)) => Finding::warn(
            what,
            format!("{leader} is said to lead, and is not in --server"),
            "name every coordinator in --server",
        ),
        ([], None) => Finding::fail(
            what,
            "nobody leads",
            "wait some seconds after a failure; then look at the coordinators' logs and at etcd",
        ),
        (several, _) => {
            let names: Vec<&str> = several.iter().map(|(server, _)| *server).collect();
            Finding::warn(
                what,
                format!("{} say that they lead", names.join(" and ")),
                "run it again: during a change of leader this can be; otherwise they are of different clusters",
            )
        }
    }
}
