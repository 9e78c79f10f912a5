//! Looking for the leader: where to knock next, and how long to wait before.
//!
//! Every coordinator can say who leads, so one answer is enough; but it may be out of date for as long
//! as an election takes. So what a follower names is tried at once, but never more than a few hops in
//! a row, and where nobody is found the pauses grow, less so right after a session has broken: then a
//! new leader is only a moment away.

use std::{
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use emberline_common::{ids::Epoch, redirect::Redirect};

/// Hints that are followed in a row without a pause.
const HOPS: u32 = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
/// While a leader was there a moment ago.
const SOON_BACKOFF: Duration = Duration::from_millis(100);
const SOON: Duration = Duration::from_secs(30);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// What is in the way is told again after this long, even if it is still the same.
const SAY_AGAIN: Duration = Duration::from_secs(60);

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
    known: Vec<String>,
    next: usize,
    hint: Option<String>,
    last: String,
    hops: u32,
    backoff: Duration,
    seen: Option<Instant>,
    /// The highest term of any leader that there was a session with.
    epoch: Epoch,
    said: Option<(String, Instant)>,
}

impl Search {
    pub fn new(known: Vec<String>) -> Self {
        Self {
            known,
            next: 0,
            hint: None,
            last: String::new(),
            hops: 0,
            backoff: FIRST_BACKOFF,
            seen: None,
            epoch: Epoch(0),
            said: None,
        }
    }

    /// Where to knock.
    pub fn next(&mut self) -> String {
        let address = self.hint.take().unwrap_or_else(|| {
            let address = self.known[self.next % self.known.len()].clone();
            self.next += 1;
            address
        });
        self.last.clone_from(&address);
        address
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
        self.said = None;
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
        let new = self
            .said
            .as_ref()
            .is_none_or(|(said, at)| said != why || at.elapsed() > SAY_AGAIN);
        // Several coordinators in turn give several causes: the hops between them say nothing new.
        if new && self.hops == 0 && self.backoff >= SOON_BACKOFF {
            tracing::warn!(coordinator = %address, %why, "there is no leader to work for; trying again");
            self.said = Some((why.to_owned(), Instant::now()));
        }
    }
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
        Search::new(vec!["a:1".to_owned(), "b:1".to_owned()])
    }

    fn hint(leader: &str) -> Option<Redirect> {
        Some(Redirect {
            leader: Some(leader.to_owned()),
            epoch: Epoch(1),
        })
    }

    #[test]
    fn all_coordinators_are_tried_in_turn() {
        let mut search = search();
        let mut tried = Vec::new();
        for _ in 0..3 {
            tried.push(search.next());
            assert!(search.failed(None) > Duration::ZERO);
        }
        assert_eq!(tried, ["a:1", "b:1", "a:1"]);
    }

    #[test]
    fn a_hint_is_followed_at_once_wherever_it_points() {
        let mut search = search();
        assert_eq!(search.next(), "a:1");
        assert_eq!(search.failed(hint("c:1")), Duration::ZERO);
        assert_eq!(search.next(), "c:1");
    }

    #[test]
    fn followers_that_point_at_each_other_are_not_asked_in_a_hot_loop() {
        let mut search = search();
        let mut waited = 0;
        for round in 0..30 {
            let at = search.next();
            let other = if at == "a:1" { "b:1" } else { "a:1" };
            if search.failed(hint(other)) > Duration::ZERO {
                waited += 1;
            }
            assert!(waited * 3 >= round - 2, "a pause at every third try");
        }
    }

    #[test]
    fn a_hint_at_itself_is_none() {
        let mut search = search();
        let at = search.next();
        assert!(search.failed(hint(&at)) > Duration::ZERO);
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
            search.next();
            assert!(search.failed(None) <= SOON_BACKOFF);
        }
    }
}
