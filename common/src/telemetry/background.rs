//! The thread on which what is to be told is made ready and sent.
//!
//! It has a lower priority than the rest of the process: where the cores are busy it takes what is left
//! over, so that being watched slows nothing that is watched. Meanwhile things wait in bounded queues.

use std::{io, sync::mpsc, thread};

use rustix::process::{Pid, setpriority_process};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// How nice it is: about a thirtieth of the share of a thread that is not (`sched(7)`).
const NICE: i32 = 15;

/// The thread, until it is stopped or dropped.
#[derive(Debug)]
pub(super) struct Background {
    handle: Handle,
    stop: CancellationToken,
    /// As the system knows it.
    me: Pid,
    thread: Option<thread::JoinHandle<()>>,
}

impl Background {
    /// Starts it.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("telemetry".to_owned());
        let (say, said) = mpsc::sync_channel(1);
        let thread = thread.spawn(move || {
            let me = rustix::thread::gettid();
            // Whoever starts it waits for this.
            let _ = say.send(me);
            if let Err(error) = setpriority_process(Some(me), NICE) {
                tracing::debug!(%error, "telemetry has no lower priority");
            }
            runtime.block_on(stopped.cancelled());
        })?;
        Ok(Self {
            handle,
            stop,
            me: said.recv().map_err(io::Error::other)?,
            thread: Some(thread),
        })
    }

    /// Where to start what is to be done on it.
    pub const fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Nothing else is left to do: it may be as fast as it can, where the system lets it.
    pub fn hurry(&self) {
        if let Err(error) = setpriority_process(Some(self.me), 0) {
            tracing::debug!(%error, "telemetry keeps its lower priority");
        }
    }

    /// Ends it and what still runs on it. Blocks until it has ended, which what runs there may not
    /// hold up.
    pub fn stop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of a task there ends that task alone.
            let _ = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_runs_on_it_is_nice_and_ends_with_it() {
        let mut background = Background::start().unwrap();
        let nice = background.handle().spawn(async {
            let me = rustix::thread::gettid();
            rustix::process::getpriority_process(Some(me)).unwrap()
        });
        assert_eq!(nice.await.unwrap(), NICE);
        let me = rustix::thread::gettid();
        assert_ne!(
            rustix::process::getpriority_process(Some(me)).unwrap(),
            NICE
        );
        let endless = background.handle().spawn(std::future::pending::<()>());
        tokio::task::spawn_blocking(move || background.stop())
            .await
            .unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), endless).await;
        assert!(ended.unwrap().unwrap_err().is_cancelled());
    }
}
