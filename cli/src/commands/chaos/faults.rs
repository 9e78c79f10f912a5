//! The faults: one part is killed, paused or asked to stop at a time, and brought back later.

use std::time::Duration;

use emberline_common::{ids::Epoch, time::Timestamp};
use emberline_coordinator::store::{StateStore as _, etcd::EtcdStore};
use rustix::process::Signal;
use tokio::time::{Instant, sleep_until};

use super::Random;
use crate::local_cluster::{LocalCluster, Node};

/// From one fault to the next.
const LEAST_GAP: Duration = Duration::from_millis(800);
const MOST_GAP: Duration = Duration::from_millis(3000);
/// How long a part that was killed or paused is away.
const LEAST_AWAY: Duration = Duration::from_millis(300);
const MOST_AWAY: Duration = Duration::from_millis(6000);

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    KillLeader,
    StopLeader,
    PauseLeader,
    KillFollower,
    KillWorker,
    PauseWorker,
    StopWorker,
    KillEtcd,
    PauseEtcd,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::KillLeader,
        Self::StopLeader,
        Self::PauseLeader,
        Self::KillFollower,
        Self::KillWorker,
        Self::PauseWorker,
        Self::StopWorker,
        Self::KillEtcd,
        Self::PauseEtcd,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::KillLeader => "leader kill -9",
            Self::StopLeader => "leader SIGTERM",
            Self::PauseLeader => "leader SIGSTOP",
            Self::KillFollower => "follower kill -9",
            Self::KillWorker => "worker kill -9",
            Self::PauseWorker => "worker SIGSTOP",
            Self::StopWorker => "worker SIGTERM",
            Self::KillEtcd => "etcd member kill -9",
            Self::PauseEtcd => "etcd member SIGSTOP",
        }
    }

    /// Whether the leadership must change before anything is assigned.
    pub(super) const fn ends_term(self) -> bool {
        matches!(
            self,
            Self::KillLeader | Self::StopLeader | Self::PauseLeader
        )
    }
}

/// One fault that was made.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    /// To whom.
    pub(super) whom: String,
    /// When it began.
    pub(super) at: Timestamp,
    /// When the part was told to come back; `None` while it is away.
    pub(super) over: Option<Timestamp>,
    /// The term at that time.
    pub(super) term: Epoch,
}

/// A part that is away.
struct Away {
    kind: Kind,
    /// Its place in its group.
    at: usize,
    back: Instant,
    /// Its place among the faults.
    fault: usize,
}

/// See the module.
pub(super) struct Faults {
    cluster: LocalCluster,
    random: Random,
    away: Vec<Away>,
    done: Vec<Fault>,
}

impl Faults {
    pub(super) fn new(cluster: LocalCluster, seed: u64) -> Self {
        Self {
            cluster,
            random: Random::new(seed),
            away: Vec::new(),
            done: Vec::new(),
        }
    }

    /// What was done so far.
    pub(super) fn done(&self) -> &[Fault] {
        &self.done
    }

    /// Waits, brings back who is due meanwhile, and makes the next fault; says which.
    pub(super) async fn next(&mut self, observer: &EtcdStore) -> anyhow::Result<String> {
        let gap = self.random.between(LEAST_GAP, MOST_GAP);
        self.pass(Instant::now() + gap).await?;
        let kind = Kind::ALL[self.random.below(Kind::ALL.len())];
        let pick = self.random.below(1 << 16);
        let away = self.random.between(LEAST_AWAY, MOST_AWAY);
        let leader = observer.watch_leader().borrow().clone();
        let Some(leader) = leader else {
            return Ok("nobody leads: no fault".to_owned());
        };
        let Some(at) = self.whom(kind, pick, &leader.address) else {
            return Ok(format!("{}: nobody to spare", kind.name()));
        };
        let node = self.node(kind, at);
        let whom = node.name.clone();
        let begun = Timestamp::now();
        match kind {
            Kind::KillLeader | Kind::KillFollower | Kind::KillWorker | Kind::KillEtcd => {
                node.kill().await?;
            }
            Kind::StopLeader | Kind::StopWorker => node.stop().await?,
            Kind::PauseLeader | Kind::PauseWorker | Kind::PauseEtcd => {
                node.signal(Signal::STOP)?;
            }
        }
        self.away.push(Away {
            kind,
            at,
            back: Instant::now() + away,
            fault: self.done.len(),
        });
        self.done.push(Fault {
            kind,
            whom: whom.clone(),
            at: begun,
            over: None,
            term: leader.epoch,
        });
        Ok(format!("{}: {whom}, away for {away:?}", kind.name()))
    }

    /// Brings everybody back.
    pub(super) async fn heal(&mut self) -> anyhow::Result<()> {
        while let Some(away) = self.away.pop() {
            self.bring_back(&away)?;
        }
        Ok(())
    }

    /// Ends the cluster.
    pub(super) async fn end(self) {
        self.cluster.end().await;
    }

    /// Waits until then, bringing back who is due.
    async fn pass(&mut self, until: Instant) -> anyhow::Result<()> {
        loop {
            let due = self.away.iter().map(|a| a.back).min();
            match due.filter(|due| *due < until) {
                None => {
                    sleep_until(until).await;
                    return Ok(());
                }
                Some(due) => {
                    sleep_until(due).await;
                    let at = self.away.iter().position(|a| a.back == due);
                    if let Some(at) = at {
                        let away = self.away.remove(at);
                        self.bring_back(&away)?;
                    }
                }
            }
        }
    }

    fn bring_back(&mut self, away: &Away) -> anyhow::Result<()> {
        let node = self.node(away.kind, away.at);
        if node.runs() {
            node.signal(Signal::CONT)?;
        } else {
            node.start()?;
        }
        if let Some(fault) = self.done.get_mut(away.fault) {
            fault.over = Some(Timestamp::now());
        }
        Ok(())
    }

    /// Whom it hits: somebody who is there and without whom the rest can go on. A majority of etcd and
    /// one worker always stay.
    fn whom(&self, kind: Kind, pick: usize, leader: &str) -> Option<usize> {
        let group = |kind: Kind| match kind {
            Kind::KillLeader | Kind::StopLeader | Kind::PauseLeader | Kind::KillFollower => 0,
            Kind::KillWorker | Kind::PauseWorker | Kind::StopWorker => 1,
            Kind::KillEtcd | Kind::PauseEtcd => 2,
        };
        let is_away = |at: usize| {
            let mut away = self.away.iter();
            away.any(|a| group(a.kind) == group(kind) && a.at == at)
        };
        let there = |nodes: &[Node]| -> Vec<usize> {
            (0..nodes.len()).filter(|at| !is_away(*at)).collect()
        };
        let cluster = &self.cluster;
        let candidates: Vec<usize> = match kind {
            Kind::KillLeader | Kind::StopLeader | Kind::PauseLeader => {
                let there = there(&cluster.coordinators);
                // With one coordinator there is nobody to take over; that is a fault, too.
                let of = |at: &usize| cluster.coordinators[*at].address == leader;
                there.into_iter().filter(of).collect()
            }
            Kind::KillFollower => {
                let there = there(&cluster.coordinators);
                let of = |at: &usize| cluster.coordinators[*at].address != leader;
                there.into_iter().filter(of).collect()
            }
            Kind::KillWorker | Kind::PauseWorker | Kind::StopWorker => {
                let there = there(&cluster.workers);
                if there.len() < 2 { Vec::new() } else { there }
            }
            Kind::KillEtcd | Kind::PauseEtcd => {
                let there = there(&cluster.etcd);
                let majority = cluster.etcd.len() / 2 + 1;
                if there.len() > majority {
                    there
                } else {
                    Vec::new()
                }
            }
        };
        (!candidates.is_empty()).then(|| candidates[pick % candidates.len()])
    }

    fn node(&mut self, kind: Kind, at: usize) -> &mut Node {
        match kind {
            Kind::KillLeader | Kind::StopLeader | Kind::PauseLeader | Kind::KillFollower => {
                &mut self.cluster.coordinators[at]
            }
            Kind::KillWorker | Kind::PauseWorker | Kind::StopWorker => {
                &mut self.cluster.workers[at]
            }
            Kind::KillEtcd | Kind::PauseEtcd => &mut self.cluster.etcd[at],
        }
    }
}
