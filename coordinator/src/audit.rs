//! The record of who changed what: one JSON object on each line, appended to a file, written before
//! the caller has its answer.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use emberline_common::time::Timestamp;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

/// Entries that wait to be written; whoever makes more waits.
const QUEUE: usize = 256;

/// Where changes are noted. Cheap to clone; what was noted is written when the last one is dropped.
#[derive(Clone)]
pub struct Audit {
    entries: mpsc::Sender<Line>,
    _writer: Arc<Writer>,
}

/// One thing that somebody did, or was not let.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Entry {
    #[serde(with = "emberline_common::time::rfc3339")]
    pub(crate) at: Timestamp,
    /// The name of the token.
    pub(crate) who: String,
    /// What the certificate says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) certificate: Option<String>,
    /// The address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
    /// Service and method.
    pub(crate) call: String,
    /// The run, the model, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on: Option<String>,
    /// `ok`, or the code of the error.
    pub(crate) outcome: &'static str,
    /// Why it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<String>,
}

/// A line, and who waits until it is written.
type Line = (String, oneshot::Sender<()>);

struct Writer {
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Audit {
    /// Appends to that file, which only its owner may read if it is made.
    ///
    /// # Errors
    /// It cannot be written, or there is no thread for it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        let (entries, incoming) = mpsc::channel(QUEUE);
        let path = path.to_owned();
        let thread = std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || write(incoming, file, &path))?;
        let thread = Mutex::new(Some(thread));
        Ok(Self {
            entries,
            _writer: Arc::new(Writer { thread }),
        })
    }

    /// Notes it. Returns when it is written.
    pub(crate) async fn note(&self, entry: &Entry) {
        match serde_json::to_string(entry) {
            Ok(line) => {
                let (written, waiting) = oneshot::channel();
                // The writer ends after all of us.
                let _ = self.entries.send((line + "\n", written)).await;
                let _ = waiting.await;
            }
            Err(error) => tracing::error!(%error, "an entry of the audit log cannot be written"),
        }
    }
}

fn write(mut incoming: mpsc::Receiver<Line>, mut file: File, path: &Path) {
    let mut failing = false;
    while let Some((line, written)) = incoming.blocking_recv() {
        match file.write_all(line.as_bytes()) {
            Ok(()) => failing = false,
            Err(error) if failing => tracing::debug!(%error, "the audit log is not written"),
            Err(error) => {
                failing = true;
                tracing::error!(path = %path.display(), %error, "the audit log is not written");
            }
        }
        // Whoever waited may have left.
        let _ = written.send(());
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // The senders are gone: it ends with what it has.
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the writer of the audit log had panicked");
        }
    }
}
