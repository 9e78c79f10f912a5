//! `bench-ask`, the process that asks: clients with a connection each, and the times of their answers.

use std::{
    io::BufRead as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use emberline_common::time::Timestamp;

use super::{
    asking::{Ask, Seen, Told},
    clients::{Client, Requests},
};
use crate::{commands::quantile, output};

/// After a failure: who refuses at once must not be asked without a pause.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Asks as the first line of standard input says, and prints one line about it.
///
/// # Errors
/// If that line cannot be read, or nobody can be connected to.
pub async fn ask() -> anyhow::Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let ask: Ask = serde_json::from_str(&line)?;
    let stop = Arc::new(AtomicBool::new(false));
    if ask.millis.is_none() {
        let stop = Arc::clone(&stop);
        // A thread of its own: a read of standard input cannot be given up.
        std::thread::spawn(move || {
            let mut rest = std::io::stdin().lock();
            while rest.fill_buf().is_ok_and(|more| !more.is_empty()) {
                let read = rest.fill_buf().map_or(0, <[u8]>::len);
                rest.consume(read);
            }
            stop.store(true, Relaxed);
        });
    }
    let requests = Arc::new(Requests::of(&ask)?);
    let mut clients = Vec::new();
    for _ in 0..ask.clients {
        clients.push(Client::connect(&ask.address, Arc::clone(&requests)).await?);
    }
    let from = Instant::now() + Duration::from_millis(ask.warm_millis);
    let until = ask
        .millis
        .map(|millis| from + Duration::from_millis(millis));
    let rest = Duration::from_micros(ask.rest_micros);
    let asking = clients.into_iter().enumerate().map(|(number, client)| {
        let client = One {
            client,
            from,
            until,
            rest,
            stop: Arc::clone(&stop),
        };
        // Not all of them the same row at a time.
        tokio::spawn(client.asks(number * 7))
    });
    let asking: Vec<_> = asking.collect();
    let mut all = Answers::default();
    for one in asking {
        all.add(one.await?);
    }
    let measured = until.unwrap_or_else(Instant::now) - from;
    let told = all.told(measured);
    Ok(output::line(serde_json::to_string(&told)?)?)
}

/// One client.
struct One {
    client: Client,
    from: Instant,
    until: Option<Instant>,
    rest: Duration,
    stop: Arc<AtomicBool>,
}

impl One {
    async fn asks(mut self, first: usize) -> Answers {
        let mut answers = Answers::default();
        let mut number = first;
        loop {
            let began = Instant::now();
            let over = self.until.is_some_and(|until| began >= until);
            if over || self.stop.load(Relaxed) {
                return answers;
            }
            match self.client.infer(number).await {
                Ok(version) => {
                    answers.saw(version);
                    // What ends after the measured time does not belong to it.
                    let ended = Instant::now();
                    if began >= self.from && self.until.is_none_or(|until| ended <= until) {
                        answers.took.push((ended - began).as_secs_f64() * 1e6);
                    }
                    if !self.rest.is_zero() {
                        tokio::time::sleep(self.rest).await;
                    }
                }
                Err(why) => {
                    answers.failed += 1;
                    answers.failure = Some(why);
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
            number += 1;
        }
    }
}

/// What became of the requests.
#[derive(Default)]
struct Answers {
    /// Microseconds of each.
    took: Vec<f64>,
    failed: u64,
    failure: Option<String>,
    versions: Vec<Seen>,
}

impl Answers {
    fn saw(&mut self, version: String) {
        if self.versions.iter().all(|seen| seen.version != version) {
            let first = Timestamp::from(SystemTime::now()).0;
            self.versions.push(Seen { version, first });
        }
    }

    fn add(&mut self, other: Self) {
        self.took.extend(other.took);
        self.failed += other.failed;
        self.failure = self.failure.take().or(other.failure);
        for seen in other.versions {
            let known = self.versions.iter_mut();
            match known.into_iter().find(|s| s.version == seen.version) {
                Some(known) => known.first = known.first.min(seen.first),
                None => self.versions.push(seen),
            }
        }
    }

    fn told(mut self, measured: Duration) -> Told {
        self.took.sort_by(f64::total_cmp);
        let at = |p| Some(quantile(&self.took, p)).filter(|micros| micros.is_finite());
        Told {
            answered: self.took.len() as u64,
            seconds: measured.as_secs_f64(),
            p50_micros: at(0.5),
            p99_micros: at(0.99),
            failed: self.failed,
            failure: self.failure,
            versions: self.versions,
        }
    }
}
