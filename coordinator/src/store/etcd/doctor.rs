//! Looking at etcd for `emberline doctor`: each member by itself, then all of them together. It
//! writes one small key below the prefix, and removes it.

use std::time::{Duration, Instant};

use emberline_common::finding::Finding;
use etcd_client::{AlarmAction, AlarmType, Client, Error, StatusResponse};
use futures::future::join_all;

use super::{
    EtcdConfig,
    members::{Members, causes},
};
use crate::store::StoreError;

/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The oldest version that is recommended: older ones can answer stale reads and lose leases.
const OLDEST: (u32, u32) = (3, 5);
/// A commit that takes longer slows every decision.
const SLOW_WRITE: Duration = Duration::from_millis(25);
/// What etcd takes if nobody says otherwise; before 3.6 it does not tell its quota.
const DEFAULT_QUOTA: i64 = 2 << 30;
/// Of the quota; above, somebody should look.
const FULL_PERCENT: i64 = 80;
const SAMPLES: usize = 11;

/// Examines etcd: members, versions, size, alarms, quorum, and how long a read and a write take.
///
/// # Errors
/// [`StoreError::Config`] if the configuration cannot be right.
pub async fn examine(config: &EtcdConfig) -> Result<Vec<Finding>, StoreError> {
    let members = Members::new(config)?;
    let asked = (0..members.len()).map(|at| ask(&members, at));
    let answers = join_all(asked).await;
    let mut findings: Vec<Finding> = answers
        .iter()
        .map(|(url, answer)| member(url, answer.as_ref().map(|(_, status)| status)))
        .collect();
    let mut answering = answers.into_iter().filter_map(|(_, answer)| answer.ok());
    let Some((client, status)) = answering.next() else {
        return Ok(findings);
    };
    let cluster = |status: &StatusResponse| status.header().map(|h| h.cluster_id());
    if answering.any(|(_, other)| cluster(&other) != cluster(&status)) {
        findings.push(Finding::fail(
            "etcd: cluster",
            "the members are of different clusters",
            "name the members of one cluster in --etcd",
        ));
    }
    findings.push(size(&status));
    findings.push(alarms(client.clone()).await);
    let prefix = config.prefix.trim_matches('/');
    findings.push(reading(client.clone(), prefix).await);
    findings.push(writing(client, prefix).await);
    Ok(findings)
}

async fn ask(members: &Members, at: usize) -> (String, Result<(Client, StatusResponse), String>) {
    let status = within(async {
        let client = members.client(at).await?;
        let status = client.maintenance_client().status().await?;
        Ok((client, status))
    });
    (members.url(at).to_owned(), status.await)
}

/// The answer, or in one line why there is none.
async fn within<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, String> {
    match tokio::time::timeout(ANSWER_WITHIN, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Error::GRpcStatus(status))) if status.message().starts_with("etcdserver") => {
            Err(status.message().to_owned())
        }
        Ok(Err(Error::GRpcStatus(status))) => Err(causes(&status)),
        Ok(Err(e)) => Err(causes(&e)),
        Err(_) => Err(format!("no answer within {ANSWER_WITHIN:?}")),
    }
}

fn member(url: &str, answer: Result<&StatusResponse, &String>) -> Finding {
    let what = format!("etcd {url}");
    let status = match answer {
        Err(why) => {
            let fix = "start it, or correct --etcd, and look at what is between";
            return Finding::fail(what, why, fix);
        }
        Ok(status) => status,
    };
    let me = status.header().map(|h| h.member_id());
    let role = match status.leader() {
        0 => "has no leader",
        leader if Some(leader) == me => "leads",
        _ => "follows",
    };
    let detail = format!("version {}, {role}", status.version());
    if status.leader() == 0 {
        let fix = "start the other members: without most of them nothing can be written";
        Finding::fail(what, detail, fix)
    } else if parsed(status.version()).is_none_or(|version| version < OLDEST) {
        let fix = "etcd 3.5 or newer is recommended: older ones are no longer mended";
        Finding::warn(what, detail, fix)
    } else {
        Finding::ok(what, detail)
    }
}

/// Major and minor.
fn parsed(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

fn size(status: &StatusResponse) -> Finding {
    let what = "etcd: size";
    let (quota, known) = match status.db_size_quota() {
        0 => (DEFAULT_QUOTA, "the default quota of"),
        quota => (quota, "its quota of"),
    };
    let mib = |bytes: i64| bytes >> 20;
    let detail = format!(
        "{} MiB, {} MiB of it in use; {known} {} MiB",
        mib(status.db_size()),
        mib(status.raft_used_db_size()),
        mib(quota)
    );
    if status.db_size() > quota / 100 * FULL_PERCENT {
        let fix = "compact and defragment etcd, or raise --quota-backend-bytes";
        Finding::warn(what, detail, fix)
    } else {
        Finding::ok(what, detail)
    }
}

async fn alarms(client: Client) -> Finding {
    let what = "etcd: alarms";
    let mut client = client.maintenance_client();
    let asked = within(client.alarm(AlarmAction::Get, AlarmType::None, None));
    let alarms = match asked.await {
        Ok(alarms) => alarms,
        Err(why) => return Finding::fail(what, why, "look at etcd's log"),
    };
    let raised: Vec<AlarmType> = alarms.alarms().iter().map(|a| a.alarm()).collect();
    if raised.contains(&AlarmType::Corrupt) {
        let fix = "a member's data is damaged: replace that member, as etcd's guide says";
        Finding::fail(what, "CORRUPT", fix)
    } else if raised.contains(&AlarmType::Nospace) {
        let fix = "compact and defragment every member, then `etcdctl alarm disarm`";
        Finding::fail(what, "NOSPACE: etcd is full and takes no writes", fix)
    } else {
        Finding::ok(what, "none")
    }
}

/// A read that a quorum answers.
async fn reading(client: Client, prefix: &str) -> Finding {
    let what = "etcd: read";
    let key = format!("{prefix}/leader");
    let mut times = Vec::new();
    let mut leads = "nobody";
    for _ in 0..SAMPLES {
        let mut client = client.kv_client();
        let start = Instant::now();
        match within(client.get(key.as_str(), None)).await {
            Ok(found) => {
                if !found.kvs().is_empty() {
                    leads = "a coordinator";
                }
            }
            Err(why) => {
                return Finding::fail(
                    what,
                    why,
                    "see that most members run, and the rights of the user",
                );
            }
        }
        times.push(start.elapsed());
    }
    let detail = format!("{}; {leads} leads below `{prefix}`", shown(median(times)));
    Finding::ok(what, detail)
}

async fn writing(client: Client, prefix: &str) -> Finding {
    let what = "etcd: write";
    let key = format!("{prefix}/doctor");
    let mut times = Vec::new();
    for _ in 0..SAMPLES {
        let mut client = client.kv_client();
        let start = Instant::now();
        if let Err(why) = within(client.put(key.as_str(), "examined", None)).await {
            let fix = "see the alarms, that most members run, and the rights of the user";
            return Finding::fail(what, why, fix);
        }
        times.push(start.elapsed());
    }
    if let Err(why) = within(client.kv_client().delete(key.as_str(), None)).await {
        return Finding::fail(what, why, format!("delete the key `{key}`"));
    }
    let took = median(times);
    if took > SLOW_WRITE {
        let fix = "give etcd a faster disk of its own, and a short way between its members";
        Finding::warn(what, shown(took), fix)
    } else {
        Finding::ok(what, shown(took))
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn shown(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}
