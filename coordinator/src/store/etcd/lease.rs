//! Leading: the key under a lease, its renewal, and its end.
//!
//! A term ends in one of four ways: its leader resigns; another one is seen under the key; etcd does
//! not know the lease any more; or, by our own monotonic clock, the lease may have run out, since no
//! renewal was answered for so long. In each case [`Term::ended`] is cancelled, and from the last
//! one on [`Term::holds`] says no even before any task has run: a process that was stopped and goes
//! on must not answer for a term that is over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use emberline_common::ids::Epoch;
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, WatchOptions};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Inner,
    commit::LastCommit,
    members::{CallError, Patience},
};
use crate::store::{Candidate, Leader, StoreError};

/// Who leads is looked up so often at least, should a watch have missed it.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// A watch of a member that says nothing is opened anew so often.
const WATCH_FOR: Duration = Duration::from_secs(10);
/// How long a farewell may take.
const RESIGN_WITHIN: Duration = Duration::from_secs(2);
/// The lease under which a coordinator says that it is there.
const PRESENCE_TTL: Duration = Duration::from_secs(10);

/// One term of ours.
pub(super) struct Term {
    pub(super) epoch: Epoch,
    lease: i64,
    /// What the deadline counts from.
    base: Instant,
    /// Until when the lease holds for sure, in nanoseconds after `base`.
    until: AtomicU64,
    /// Cancelled when the term is over, or may be.
    pub(super) ended: CancellationToken,
    /// The last commit; locked for the whole of a commit, so that there is one at a time.
    pub(super) last: Mutex<LastCommit>,
}

impl Term {
    /// Whether the term can't have ended yet.
    pub(super) fn holds(&self) -> bool {
        !self.ended.is_cancelled() && Instant::now() < self.deadline()
    }

    fn deadline(&self) -> Instant {
        self.base + Duration::from_nanos(self.until.load(Ordering::Acquire))
    }

    /// A renewal that was sent then has been answered.
    fn renewed(&self, sent: Instant, ttl: Duration) {
        let until = sent.duration_since(self.base) + safe(ttl);
        let until = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.until.fetch_max(until, Ordering::AcqRel);
    }
}

/// For how long after a renewal was sent the lease is sure to hold: a tenth less than its length,
/// since two clocks do not run alike.
fn safe(ttl: Duration) -> Duration {
    ttl.mul_f64(0.9)
}

/// Who leads, as read at one revision.
pub(super) struct Read {
    pub(super) leader: Option<Leader>,
    pub(super) lease: i64,
    pub(super) revision: i64,
}

/// The value of the leader key. The epoch is the key's create revision, and not in it.
#[derive(Debug, Serialize, Deserialize)]
struct LeaderValue {
    name: String,
    address: String,
}

fn epoch_of(create_revision: i64) -> Epoch {
    Epoch(u64::try_from(create_revision).unwrap_or(0))
}

pub(super) fn revision_of(epoch: Epoch) -> i64 {
    i64::try_from(epoch.0).unwrap_or(i64::MAX)
}

fn leader_of(create_revision: i64, value: &[u8]) -> Leader {
    // Whoever wrote something else there still leads, as far as the fence is concerned.
    let value = serde_json::from_slice(value).unwrap_or_else(|_| LeaderValue {
        name: "unknown".to_owned(),
        address: String::new(),
    });
    Leader {
        name: value.name,
        address: value.address,
        epoch: epoch_of(create_revision),
    }
}

impl Inner {
    /// Reads the leader key, linearizably.
    pub(super) async fn read_leader(&self, patience: Patience) -> Result<Read, CallError> {
        let key = self.keys.leader.clone();
        let got = self
            .pulse
            .call(patience, |client| {
                let key = key.clone();
                async move { client.kv_client().get(key, None).await }
            })
            .await?;
        let kv = got.kvs().first();
        Ok(Read {
            leader: kv.map(|kv| leader_of(kv.create_revision(), kv.value())),
            lease: kv.map_or(0, etcd_client::KeyValue::lease),
            revision: got
                .header()
                .map_or(0, etcd_client::ResponseHeader::revision),
        })
    }

    /// Becomes the leader as soon as nobody is.
    pub(super) async fn campaign(
        &self,
        candidate: Candidate,
        mut seen: watch::Receiver<Option<Leader>>,
    ) -> Result<Arc<Term>, StoreError> {
        let failed = |e: CallError| e.into_store("campaign");
        loop {
            let now = self.read_leader(Patience::Endless).await.map_err(failed)?;
            if let Some(leader) = now.leader {
                let other = |l: &Option<Leader>| l.as_ref().map(|l| l.epoch) != Some(leader.epoch);
                // What the watch saw may be older than what was just read: then it changes soon.
                let changes = async {
                    while seen.changed().await.is_ok() {
                        if other(&seen.borrow_and_update()) {
                            break;
                        }
                    }
                };
                let _ = timeout(LOOK_AGAIN, changes).await;
                continue;
            }
            if let Some(term) = self.try_to_lead(&candidate).await.map_err(failed)? {
                return Ok(term);
            }
        }
    }

    async fn try_to_lead(&self, candidate: &Candidate) -> Result<Option<Arc<Term>>, CallError> {
        let ttl = self.lease_ttl;
        let sent = Instant::now();
        // A grant whose answer is late belongs to a lease that has partly run: so it is sent anew.
        let patience = Patience::Until(sent + ttl / 2);
        let granted = self.pulse.call(patience, |client| async move {
            client.lease_client().grant(seconds(ttl), None).await
        });
        let lease = match granted.await {
            Ok(granted) => {
                self.pulse.wrote();
                granted.id()
            }
            Err(CallError::GaveUp(_)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let value = serde_json::to_vec(&LeaderValue {
            name: candidate.name.clone(),
            address: candidate.address.clone(),
        });
        let value = value.unwrap_or_default();
        let txn = Txn::new()
            .when([Compare::create_revision(
                self.keys.leader.as_str(),
                CompareOp::Equal,
                0,
            )])
            .and_then([
                TxnOp::put(
                    self.keys.leader.as_str(),
                    value,
                    Some(PutOptions::new().with_lease(lease)),
                ),
                TxnOp::get(self.keys.commit.as_str(), None),
            ]);
        let done = self.pulse.call(patience, |client| {
            let txn = txn.clone();
            async move { client.kv_client().txn(txn).await }
        });
        let led = match done.await {
            Ok(done) if done.succeeded() => {
                let epoch = done
                    .header()
                    .map_or(0, etcd_client::ResponseHeader::revision);
                Some((epoch_of(epoch), LastCommit::of_txn(&done, 1)))
            }
            Ok(_) | Err(CallError::GaveUp(_) | CallError::NoLease) => {
                // Its answer may have been lost: the lease says whether the key is ours.
                let read = self.read_leader(Patience::Until(sent + ttl)).await;
                match read {
                    Ok(Read {
                        leader: Some(leader),
                        lease: of,
                        ..
                    }) if of == lease => {
                        let last = self.last_commit(Patience::Until(sent + ttl)).await?;
                        Some((leader.epoch, last))
                    }
                    _ => None,
                }
            }
            Err(e) => return Err(e),
        };
        let Some((epoch, last)) = led else {
            self.revoke(lease).await;
            return Ok(None);
        };
        let term = Term {
            epoch,
            lease,
            base: sent,
            until: AtomicU64::new(0),
            ended: self.stop.child_token(),
            last: Mutex::new(last),
        };
        term.renewed(sent, ttl);
        let term = Arc::new(term);
        self.set_term(Some(Arc::clone(&term)));
        Ok(Some(term))
    }

    /// Renews the lease until the term has ended, by whatever cause.
    pub(super) async fn keep(self: Arc<Self>, term: Arc<Term>) {
        let renew = async {
            let every = self.lease_ttl / 3;
            let mut due = Instant::now();
            loop {
                let sent = Instant::now();
                let deadline = term.deadline();
                if sent >= deadline {
                    return "its lease could not be renewed in time";
                }
                let lease = term.lease;
                let patience = Patience::Until(deadline);
                let renewed = self.pulse.call(patience, |client| {
                    let sent = Instant::now();
                    async move {
                        client.lease_client().keep_alive(lease).await?;
                        Ok(sent)
                    }
                });
                match timeout(deadline - sent, renewed).await {
                    Ok(Ok(sent)) => term.renewed(sent, self.lease_ttl),
                    Ok(Err(CallError::NoLease)) => return "etcd has ended its lease",
                    // Asked again at once, until the deadline ends it.
                    Ok(Err(_)) | Err(_) => {
                        sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                }
                due += every;
                tokio::time::sleep_until(due.max(Instant::now())).await;
            }
        };
        let compact = self.compact(term.epoch);
        tokio::select! {
            () = term.ended.cancelled() => {}
            why = renew => {
                tracing::warn!(epoch = %term.epoch, why, "the term is over");
                term.ended.cancel();
            }
            () = compact => {}
        }
    }

    /// Lets etcd forget what the keys were an interval ago; never ends.
    async fn compact(&self, epoch: Epoch) {
        let Some(every) = self.compact_every else {
            return std::future::pending().await;
        };
        let mut ticks = interval_at(Instant::now() + every, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = revision_of(epoch);
        loop {
            ticks.tick().await;
            let patience = Patience::Until(Instant::now() + every / 2);
            let now = self.read_leader(patience).await.map(|read| read.revision);
            let compacted = self.pulse.call(patience, |client| async move {
                client.kv_client().compact(before, None).await
            });
            match compacted.await {
                // Somebody else may have done so.
                Ok(_) | Err(CallError::Compacted) => {}
                Err(e) => tracing::debug!(error = ?e, "etcd was not compacted"),
            }
            before = now.unwrap_or(before);
        }
    }

    pub(super) async fn resign(&self, epoch: Epoch) -> Result<(), StoreError> {
        let Some(term) = self.term(epoch) else {
            return Ok(());
        };
        term.ended.cancel();
        // A commit that is under way is waited for, so that it does not come after the farewell.
        let last = timeout(RESIGN_WITHIN, term.last.lock()).await;
        self.set_term(None);
        self.revoke(term.lease).await;
        drop(last);
        Ok(())
    }

    /// Ends the lease under which that term's leader leads, if it still does.
    pub(super) async fn depose(&self, epoch: Epoch) -> Result<(), StoreError> {
        let patience = Patience::Until(Instant::now() + RESIGN_WITHIN);
        let now = self.read_leader(patience).await;
        let now = now.map_err(|e| e.into_store("read who leads"))?;
        if now.leader.is_some_and(|l| l.epoch == epoch) && now.lease != 0 {
            self.revoke(now.lease).await;
        }
        Ok(())
    }

    async fn revoke(&self, lease: i64) {
        let patience = Patience::Until(Instant::now() + RESIGN_WITHIN);
        let revoked = self.pulse.call(patience, |client| async move {
            client.lease_client().revoke(lease).await
        });
        match revoked.await {
            Ok(_) | Err(CallError::NoLease) => {}
            // It runs out by itself.
            Err(e) => tracing::debug!(error = ?e, "a lease was not revoked"),
        }
    }

    /// Follows who leads until the store is dropped.
    pub(super) async fn follow(self: Arc<Self>, seen: watch::Sender<Option<Leader>>) {
        let following = async {
            loop {
                let Ok(now) = self.read_leader(Patience::Endless).await else {
                    sleep(LOOK_AGAIN).await;
                    continue;
                };
                self.saw(&seen, now.leader);
                self.watch_from(now.revision + 1, &seen).await;
            }
        };
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = following => {}
        }
    }

    /// Takes in what the watch says, until the watch breaks: then it is read again.
    async fn watch_from(&self, revision: i64, seen: &watch::Sender<Option<Leader>>) {
        let Ok((at, client)) = self.pulse.streaming().await else {
            return sleep(Duration::from_millis(50)).await;
        };
        let options = WatchOptions::new().with_start_revision(revision);
        let mut watching = client.watch_client();
        let opened = watching.watch(self.keys.leader.as_str(), Some(options));
        let Ok(Ok(mut stream)) = timeout(LOOK_AGAIN, opened).await else {
            self.pulse.leave(at);
            return sleep(Duration::from_millis(50)).await;
        };
        // A member that is cut off says nothing; so the watch is opened anew once in a while.
        while let Ok(next) = timeout(WATCH_FOR, stream.message()).await {
            let Ok(Some(response)) = next else {
                self.pulse.leave(at);
                return sleep(Duration::from_millis(50)).await;
            };
            if response.canceled() {
                return sleep(Duration::from_millis(50)).await;
            }
            for event in response.events() {
                let put = event.event_type() == etcd_client::EventType::Put;
                let kv = event.kv().filter(|_| put);
                self.saw(
                    seen,
                    kv.map(|kv| leader_of(kv.create_revision(), kv.value())),
                );
            }
        }
    }

    fn saw(&self, seen: &watch::Sender<Option<Leader>>, leader: Option<Leader>) {
        let epoch = leader.as_ref().map(|l| l.epoch);
        let term = self
            .term
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // A watch may lag behind our own campaign; only what is newer than that ends our term. The
        // end of our key comes as its deletion, which the renewal and the next commit find too.
        if let (Some(term), Some(epoch)) = (term.as_ref(), epoch)
            && epoch > term.epoch
        {
            term.ended.cancel();
        }
        drop(term);
        seen.send_if_modified(|now| {
            let changed = *now != leader;
            *now = leader;
            changed
        });
    }

    /// Says that a coordinator is there, for as long as it is polled.
    pub(super) async fn announce(self: Arc<Self>, candidate: Candidate) {
        let key = self.keys.coordinator(&candidate.address);
        let value = serde_json::to_vec(&candidate).unwrap_or_default();
        loop {
            let granted = self.pulse.call(Patience::Endless, |client| async move {
                let ttl = seconds(PRESENCE_TTL);
                client.lease_client().grant(ttl, None).await
            });
            let Ok(granted) = granted.await else {
                sleep(LOOK_AGAIN).await;
                continue;
            };
            let lease = granted.id();
            let put = self.pulse.call(Patience::Endless, |client| {
                let (key, value) = (key.clone(), value.clone());
                let options = PutOptions::new().with_lease(lease);
                async move { client.kv_client().put(key, value, Some(options)).await }
            });
            if put.await.is_err() {
                continue;
            }
            loop {
                sleep(PRESENCE_TTL / 3).await;
                let renewed = self.pulse.call(Patience::Endless, |client| async move {
                    client.lease_client().keep_alive(lease).await
                });
                if renewed.await.is_err() {
                    break;
                }
            }
        }
    }

    /// Those that say that they are there.
    pub(super) async fn coordinators(&self) -> Result<Vec<Candidate>, StoreError> {
        let prefix = self.keys.coordinator("");
        let patience = Patience::Until(Instant::now() + LOOK_AGAIN);
        let got = self.pulse.call(patience, |client| {
            let (prefix, options) = (prefix.clone(), GetOptions::new().with_prefix());
            async move { client.kv_client().get(prefix, Some(options)).await }
        });
        let got = got.await.map_err(|e| e.into_store("list coordinators"))?;
        let known = got.kvs().iter();
        Ok(known
            .filter_map(|kv| serde_json::from_slice(kv.value()).ok())
            .collect())
    }
}

fn seconds(ttl: Duration) -> i64 {
    i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX)
}
