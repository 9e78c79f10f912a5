//! Streams that break because another coordinator leads now: when to open them again, and when to
//! stop. What a stream begins with when it is opened again is the business of whoever reads it.

use std::time::Duration;

use emberline_proto::v1::{
    WatchRunRequest, WatchRunResponse, run_service_client::RunServiceClient,
};
use futures::{Stream, stream};
use tokio::time::{Instant, sleep};
use tonic::{Code, Status, Streaming};

use crate::leader_channel::{LeaderChannel, is_broken};

const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// A stream that has broken again and again for this long, and brought nothing, is given up.
const GIVE_UP: Duration = Duration::from_secs(30);

/// How often a stream has broken since it last brought something.
#[derive(Default)]
pub struct Reopen {
    since: Option<Instant>,
    backoff: Duration,
}

impl Reopen {
    /// The stream has brought something.
    pub fn went_on(&mut self) {
        *self = Self::default();
    }

    /// The stream has broken: returns when it may be opened again, the first time at once.
    ///
    /// # Errors
    /// The status, if it is not one after which to try again, or there were too many.
    pub async fn after(&mut self, status: Status) -> Result<(), Status> {
        let pause = self.pause(status, Instant::now())?;
        sleep(pause).await;
        Ok(())
    }

    fn pause(&mut self, status: Status, now: Instant) -> Result<Duration, Status> {
        // Whoever reads too slowly is told so, and begins anew.
        let again = is_broken(&status) || status.code() == Code::ResourceExhausted;
        let since = *self.since.get_or_insert(now);
        if !again || now.duration_since(since) > GIVE_UP {
            return Err(status);
        }
        tracing::debug!(why = %status.message(), "a stream broke; opening it again");
        let pause = self.backoff;
        self.backoff = (self.backoff * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF);
        Ok(pause)
    }
}

struct Watch {
    runs: RunServiceClient<LeaderChannel>,
    run: String,
    open: Option<Streaming<WatchRunResponse>>,
    reopen: Reopen,
}

/// Everything that becomes of a run, under one leader after another. Each of them begins with a
/// snapshot. It does not end by itself: whoever reads knows the last event.
pub fn watch(
    runs: RunServiceClient<LeaderChannel>,
    run: String,
) -> impl Stream<Item = Result<WatchRunResponse, Status>> {
    let watch = Watch {
        runs,
        run,
        open: None,
        reopen: Reopen::default(),
    };
    stream::try_unfold(watch, |mut watch| async move {
        let event = watch.next().await?;
        Ok(Some((event, watch)))
    })
}

impl Watch {
    async fn next(&mut self) -> Result<WatchRunResponse, Status> {
        loop {
            let stream = match &mut self.open {
                Some(stream) => stream,
                None => {
                    let run = self.run.clone();
                    let opened = self.runs.watch_run(WatchRunRequest { run }).await?;
                    self.open.insert(opened.into_inner())
                }
            };
            let broken = match stream.message().await {
                Ok(Some(event)) => {
                    self.reopen.went_on();
                    return Ok(event);
                }
                Ok(None) => Status::unavailable("the watch ended before the run"),
                Err(status) => status,
            };
            self.open = None;
            self.reopen.after(broken).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The pauses between the tries of a stream that brings nothing, until it is given up.
    fn pauses(reopen: &mut Reopen) -> Vec<Duration> {
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        while let Ok(pause) = reopen.pause(Status::unavailable(""), now) {
            pauses.push(pause);
            now += pause;
        }
        pauses
    }

    #[test]
    fn a_stream_is_opened_again_at_once_then_ever_more_slowly_and_at_last_given_up() {
        let mut reopen = Reopen::default();
        let first = pauses(&mut reopen);
        assert_eq!(first[..3], [0, 10, 20].map(Duration::from_millis));
        assert!(first.iter().all(|pause| *pause <= MAX_BACKOFF));
        let whole: Duration = first.iter().sum();
        assert!(whole > GIVE_UP && whole <= GIVE_UP + MAX_BACKOFF);
        reopen.went_on();
        assert_eq!(pauses(&mut reopen), first, "one that brings something");
    }

    #[test]
    fn an_error_of_ones_own_is_no_reason_to_try_again() {
        let mut reopen = Reopen::default();
        let status = reopen.pause(Status::not_found("no such run"), Instant::now());
        assert_eq!(status.unwrap_err().code(), Code::NotFound);
    }
}
