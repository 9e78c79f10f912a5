//! Looking for the leader: where to knock next, and how long to wait before.
//!
//! All coordinators are asked at the same time whether they lead, since one that does not answer (a
//! machine that vanished, a process that is paused) must not keep a worker from the one that does.
//! Every follower can say who leads, so a worker that knows one of them finds the others; but what it
//! says may be out of date for as long as an election takes. So what a follower names is tried at
//! once, but never more than a few hops in a row, and where nobody is found the pauses grow, less so
//! right after a session has broken: then a new leader is only a moment away.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use emberline_common::{ids::Epoch, redirect::Redirect, tls::Dialer};
use emberline_proto::v1::worker_service_server::SERVICE_NAME;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::timeout;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::session::endpoint;

/// How long a coordinator may take to say whether it leads.
const ASK_WITHIN: Duration = Duration::from_millis(500);
/// Coordinators that are remembered beside those that the worker was told of.
const LEARNED: usize = 16;

/// Hints that are followed in a row without a pause.
const HOPS: u32 = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
/// While a leader was there a moment ago.
const SOON_BACKOFF: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_secs(30);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// What is in the way is told again after this long, even if it is still the same.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// Different causes that are told in that time.
const CAUSES: usize = 16;

/// A leader that a worker has a session with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderSeen {
    /// Where.
    pub address: String,
    /// Its term.
    pub epoch: Epoch,
}

/// See the module.
pub(crate) struct Search {
    dialer: Dialer,
    known: Vec<String>,
    /// Of those, the ones that a follower has named.
    learned: usize,
    next: usize,
    hint: Option<String>,
    last: String,
    hops: u32,
    backoff: Duration,
    seen: Option<Instant>,
    /// The highest term of any leader that there was a session with.
    epoch: Epoch,
    /// The causes that were told lately.
    said: Vec<(String, Instant)>,
}

impl Search {
    pub fn new(known: Vec<String>, dialer: Dialer) -> Self {
        Self {
            dialer,
            known,
            learned: 0,
            next: 0,
            hint: None,
            last: String::new(),
            hops: 0,
            backoff: FIRST_BACKOFF,
            seen: None,
            epoch: Epoch(0),
            said: Vec::new(),
        }
    }

    /// Where to knock: at the one that was named, at the one that says that it leads, or at any that
    /// answers, to learn why nobody does.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn next(&mut self) -> Result<String, String> {
        let address = match self.take_hint() {
            // It may be the leader that has just died, or is paused: then it says nothing.
            Some(hint) => match leads(&self.dialer, &hint).await {
                Ok(_) => hint,
                Err(why) => return Err(format!("{hint}, which is said to lead: {why}")),
            },
            None => self.ask_all().await?,
        };
        self.last.clone_from(&address);
        Ok(address)
    }

    fn take_hint(&mut self) -> Option<String> {
        let hint = self.hint.take()?;
        self.last.clone_from(&hint);
        Some(hint)
    }

    async fn ask_all(&mut self) -> Result<String, String> {
        // In turn, so that each follower is asked once in a while.
        self.next += 1;
        let begin = self.next % self.known.len();
        let (after, before) = self.known.split_at(begin);
        let dialer = &self.dialer;
        let mut asked: FuturesUnordered<_> = before
            .iter()
            .chain(after)
            .map(|address| async move { (address, leads(dialer, address).await) })
            .collect();
        let mut follower = None;
        // By address, so that what is told is the same whoever is the last to fail.
        let mut silent = BTreeMap::new();
        while let Some((address, said)) = asked.next().await {
            match said {
                Ok(true) => return Ok(address.clone()),
                Ok(false) => follower = follower.or(Some(address)),
                Err(why) => drop(silent.insert(address, why)),
            }
        }
        follower.cloned().ok_or_else(|| {
            let each = silent
                .iter()
                .map(|(address, why)| format!("{address}: {why}"));
            each.collect::<Vec<_>>().join("; ")
        })
    }

    /// A leader has answered.
    ///
    /// # Errors
    /// It leads no more: a later leader has been seen.
    pub fn found(&mut self, address: &str, epoch: Epoch) -> Result<(), String> {
        if epoch < self.epoch {
            return Err(format!(
                "{address} leads term {epoch}, but term {} was seen: it leads no more (if the cluster was made anew, restart this worker)",
                self.epoch
            ));
        }
        self.epoch = epoch;
        self.said.clear();
        Ok(())
    }

    /// A session has just ended.
    pub fn had_one(&mut self) {
        self.seen = Some(Instant::now());
        self.backoff = FIRST_BACKOFF;
        self.hops = 0;
    }

    /// It came to nothing; how long to wait before the next.
    pub fn failed(&mut self, redirect: Option<Redirect>) -> Duration {
        let hint = redirect.and_then(|r| r.leader);
        if let Some(leader) = hint.filter(|leader| *leader != self.last)
            && self.hops < HOPS
        {
            self.hops += 1;
            if !self.known.contains(&leader) && self.learned < LEARNED {
                self.learned += 1;
                self.known.push(leader.clone());
            }
            self.hint = Some(leader);
            return Duration::ZERO;
        }
        self.hops = 0;
        let soon = self.seen.is_some_and(|seen| seen.elapsed() < SOON);
        let most = if soon { SOON_BACKOFF } else { MAX_BACKOFF };
        let wait = jittered(self.backoff.min(most));
        self.backoff = (self.backoff * 2).min(most);
        wait
    }

    /// Tells what is in the way, once for each cause.
    pub fn say(&mut self, address: &str, why: &str) {
        // The hops between coordinators say nothing new.
        if self.hops == 0 && self.backoff >= SOON_BACKOFF && self.is_new(why) {
            tracing::warn!(coordinator = %address, %why, "there is no leader to work for; trying again");
        }
    }

    /// Whether a cause was not told lately; then it is now. Several coordinators in turn may give
    /// several.
    fn is_new(&mut self, why: &str) -> bool {
        self.said.retain(|(_, at)| at.elapsed() <= SAY_AGAIN);
        if self.said.len() >= CAUSES || self.said.iter().any(|(said, _)| said == why) {
            return false;
        }
        self.said.push((why.to_owned(), Instant::now()));
        true
    }
}

/// Whether the coordinator there leads.
async fn leads(dialer: &Dialer, address: &str) -> Result<bool, String> {
    let asked = async {
        let channel = dialer.connect(&endpoint(dialer, address)?).await;
        let channel = channel.map_err(|e| crate::session::chain(&e))?;
        let request = HealthCheckRequest {
            service: SERVICE_NAME.to_owned(),
        };
        let answer = HealthClient::new(channel).check(request).await;
        let answer = answer.map_err(|status| status.message().to_owned())?;
        Ok(answer.into_inner().status() == ServingStatus::Serving)
    };
    timeout(ASK_WITHIN, asked)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {ASK_WITHIN:?}")))
}

/// Between half of it and all of it.
fn jittered(backoff: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) % 1000;
    backoff.mul_f64(0.5 + f64::from(u32::try_from(random).unwrap_or(0)) / 2000.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn search() -> Search {
        Search::new(vec!["a:1".to_owned(), "b:1".to_owned()], Dialer::default())
    }

    fn hint(leader: &str) -> Option<Redirect> {
        Some(Redirect {
            leader: Some(leader.to_owned()),
            epoch: Epoch(1),
        })
    }

    #[test]
    fn a_hint_is_followed_at_once_wherever_it_points() {
        let mut search = search();
        assert_eq!(search.failed(hint("c:1")), Duration::ZERO);
        assert_eq!(search.take_hint().as_deref(), Some("c:1"));
        assert_eq!(search.known, ["a:1", "b:1", "c:1"], "and remembered");
    }

    #[test]
    fn followers_that_point_at_each_other_are_not_asked_in_a_hot_loop() {
        let mut search = search();
        let mut waited = 0;
        for round in 0..30 {
            let other = if round % 2 == 0 { "a:1" } else { "b:1" };
            if search.failed(hint(other)) > Duration::ZERO {
                waited += 1;
            } else {
                search.take_hint().unwrap();
            }
        }
        assert!(waited >= 10, "a pause at every third try, not {waited}");
    }

    #[test]
    fn a_hint_at_itself_is_none() {
        let mut search = search();
        search.failed(hint("c:1"));
        search.take_hint().unwrap();
        assert!(search.failed(hint("c:1")) > Duration::ZERO);
    }

    #[tokio::test]
    async fn a_coordinator_that_does_not_answer_keeps_nobody_waiting() {
        // Its system takes connections, but nobody speaks: so is a process that is paused.
        let paused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = paused.local_addr().unwrap().to_string();
        let mut search = Search::new(vec![address.clone()], Dialer::default());
        let begun = Instant::now();
        let why = search.next().await.unwrap_err();
        assert!(why.contains(&address), "{why}");
        assert!(begun.elapsed() < ASK_WITHIN * 3, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn all_that_do_not_answer_are_told_and_only_once() {
        let refused = [(); 3].map(|()| {
            let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            closed.local_addr().unwrap().to_string()
        });
        let mut search = Search::new(refused.to_vec(), Dialer::default());
        let mut told = 0;
        for _ in 0..6 {
            let why = search.next().await.unwrap_err();
            for address in &refused {
                assert!(why.contains(address), "{why}");
            }
            told += u32::from(search.is_new(&why));
        }
        assert_eq!(told, 1);
        assert!(search.is_new("something else"));
        search.found("a:1", Epoch(1)).unwrap();
        assert!(search.is_new("something else"), "there was a leader since");
        for n in 0..100 {
            search.is_new(&n.to_string());
        }
        assert_eq!(search.said.len(), CAUSES);
    }

    #[test]
    fn a_leader_of_an_earlier_term_is_refused() {
        let mut search = search();
        search.found("a:1", Epoch(5)).unwrap();
        assert!(search.found("b:1", Epoch(4)).is_err());
        search.found("a:1", Epoch(5)).unwrap();
        search.found("b:1", Epoch(9)).unwrap();
        assert!(search.found("a:1", Epoch(5)).is_err());
    }

    #[test]
    fn right_after_a_session_the_pauses_stay_short() {
        let mut search = search();
        search.had_one();
        for _ in 0..20 {
            assert!(search.failed(None) <= SOON_BACKOFF);
        }
    }
}
