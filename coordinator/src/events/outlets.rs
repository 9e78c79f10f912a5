//! Where events go: a file of JSON lines, or a sink that takes HTTP POSTs.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use emberline_common::tls;
use reqwest::{Client, StatusCode, Url, header, redirect::Policy};
use thiserror::Error;

use super::event::Event;

/// How long a sink may take to take an event.
const POST_WITHIN: Duration = Duration::from_secs(10);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// A connection on which nothing was posted for that long is closed.
const IDLE: Duration = Duration::from_secs(20);
/// The longest that a sink may ask us to wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Why an outlet cannot be used as it was named.
#[derive(Debug, Error)]
pub enum OutletError {
    /// The file cannot be written.
    #[error("cannot write events to `{}`: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The sink is no web address.
    #[error(
        "`{shown}` is no place to post events to: {why}; write e.g. `https://sink.example.org/events`"
    )]
    Sink {
        /// What was written, without what could be a secret.
        shown: String,
        /// What does not fit.
        why: String,
    },
}

/// Why events were not taken.
#[derive(Debug, Error)]
pub(super) enum NotTaken {
    /// They may be, later.
    #[error("{why}")]
    Yet {
        why: String,
        /// How long it asks us to wait.
        wait: Option<Duration>,
    },
    /// It says that this event is wrong: it would say so again.
    #[error("it answered {0}")]
    Never(StatusCode),
}

/// One place that events go to. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Outlet(Way);

#[derive(Debug, Clone)]
enum Way {
    File(Arc<Path>),
    Sink { client: Client, url: Url },
}

impl Outlet {
    /// A file that events are appended to, one JSON object on each line; made if it is not there.
    ///
    /// # Errors
    /// [`OutletError::File`].
    pub fn file(path: &Path) -> Result<Self, OutletError> {
        let failed = |source| OutletError::File {
            path: path.to_owned(),
            source,
        };
        let path = std::path::absolute(path).map_err(failed)?;
        open(&path).map_err(failed)?;
        Ok(Self(Way::File(path.into())))
    }

    /// A sink that takes CloudEvents.
    ///
    /// # Errors
    /// [`OutletError::Sink`].
    pub fn sink(url: &str) -> Result<Self, OutletError> {
        let wrong = |shown: &str, why: String| OutletError::Sink {
            shown: shown.to_owned(),
            why,
        };
        let parsed = Url::parse(url);
        let url = parsed.map_err(|e| wrong("--events-sink", e.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") {
            let why = format!(
                "events are posted by `http` and `https`, not by `{}`",
                url.scheme()
            );
            return Err(wrong(&shown(&url), why));
        }
        tls::install_crypto_provider();
        let client = Client::builder()
            .user_agent(concat!("emberline/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_WITHIN)
            .timeout(POST_WITHIN)
            .pool_idle_timeout(IDLE)
            .redirect(Policy::none())
            .referer(false)
            .build();
        let client = client.map_err(|e| wrong(&shown(&url), e.to_string()))?;
        Ok(Self(Way::Sink { client, url }))
    }

    /// Its name, for people: without what may be a secret.
    pub(super) fn name(&self) -> String {
        match &self.0 {
            Way::File(path) => path.display().to_string(),
            Way::Sink { url, .. } => shown(url),
        }
    }

    /// Tells events in order. Gives how many of them were taken, at least one.
    pub(super) async fn tell(&self, events: &[Event]) -> Result<usize, NotTaken> {
        match &self.0 {
            Way::File(path) => {
                let lines: String = events.iter().map(|e| format!("{}\n", e.json)).collect();
                let (path, number) = (Arc::clone(path), events.len());
                let written = tokio::task::spawn_blocking(move || append(&path, &lines)).await;
                let written = written.map_err(io::Error::other).flatten();
                written.map(|()| number).map_err(|e| NotTaken::Yet {
                    why: e.to_string(),
                    wait: None,
                })
            }
            Way::Sink { client, url } => match events.first() {
                Some(event) => post(client, url, event).await.map(|()| 1),
                None => Ok(0),
            },
        }
    }

    /// Makes sure that what was told is not lost with this machine's memory.
    pub(super) async fn settle(&self) -> Result<(), NotTaken> {
        let Way::File(path) = &self.0 else {
            return Ok(());
        };
        let path = Arc::clone(path);
        let synced = tokio::task::spawn_blocking(move || match open(&path)?.sync_data() {
            // A pipe or a terminal has nothing to be synced.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        });
        let synced = synced.await.map_err(io::Error::other).flatten();
        synced.map_err(|e| NotTaken::Yet {
            why: e.to_string(),
            wait: None,
        })
    }
}

async fn post(client: &Client, url: &Url, event: &Event) -> Result<(), NotTaken> {
    let request = client
        .post(url.clone())
        .header(
            header::CONTENT_TYPE,
            "application/cloudevents+json; charset=utf-8",
        )
        .body(event.envelope().to_string());
    let answer = request.send().await.map_err(|e| NotTaken::Yet {
        why: why(&e),
        wait: None,
    })?;
    let status = answer.status();
    match status {
        status if status.is_success() => Ok(()),
        StatusCode::BAD_REQUEST
        | StatusCode::PAYLOAD_TOO_LARGE
        | StatusCode::UNSUPPORTED_MEDIA_TYPE
        | StatusCode::UNPROCESSABLE_ENTITY => Err(NotTaken::Never(status)),
        status => {
            let wait = answer.headers().get(header::RETRY_AFTER);
            let wait = wait.and_then(|v| v.to_str().ok()?.trim().parse().ok());
            Err(NotTaken::Yet {
                why: format!("it answered {status}"),
                wait: wait.map(|s| Duration::from_secs(s).min(LONGEST_WAIT)),
            })
        }
    }
}

/// The innermost cause, which says most; never the address, which may have a secret in it.
fn why(e: &reqwest::Error) -> String {
    if e.is_timeout() {
        return "it did not answer in time".to_owned();
    }
    let mut cause: &dyn std::error::Error = match std::error::Error::source(e) {
        Some(cause) => cause,
        None => return "the request failed".to_owned(),
    };
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A web address without user, password and query.
fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

/// A pipe that nobody reads is an error and not a wait.
fn open(path: &Path) -> io::Result<File> {
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut options = OpenOptions::new();
    options.append(true).create(true).custom_flags(nonblock);
    options.open(path)
}

fn append(path: &Path, lines: &str) -> io::Result<()> {
    let mut file = open(path)?;
    let torn = if is_torn(path) { "\n" } else { "" };
    // In one piece, so that lines of several coordinators do not mix.
    file.write_all([torn, lines].concat().as_bytes())
}

/// Whether somebody who was killed has left the beginning of a line.
fn is_torn(path: &Path) -> bool {
    let regular = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() > 0);
    let last = || {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut last = [0];
        file.read_exact(&mut last)?;
        io::Result::Ok(last[0])
    };
    regular && last().is_ok_and(|last| last != b'\n')
}
