//! What is read from files, and read again when they have changed: certificates, tokens.

use std::{
    fmt::Display,
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;

/// How often the files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something that files say. There is no task: whoever wants it has the files looked at, once in a
/// while.
pub struct Reloaded<T> {
    what: &'static str,
    files: Vec<PathBuf>,
    read: Box<dyn Fn() -> Result<T, String> + Send + Sync>,
    current: ArcSwap<T>,
    looked: Mutex<Looked>,
}

struct Looked {
    at: Instant,
    /// What the files were when they were read last.
    stamps: Vec<Stamp>,
    /// What was told last of files that cannot be used.
    told: String,
}

/// Tells whether a file is another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Reads it for the first time. `what` it is, in plural, is for the log.
    ///
    /// # Errors
    /// What `read` says.
    pub fn open<E: Display>(
        what: &'static str,
        files: Vec<PathBuf>,
        read: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, E> {
        // Before they are read: what changes meanwhile is found at the first look.
        let stamps = stamps(&files);
        let current = read()?;
        Ok(Arc::new(Self {
            what,
            files,
            read: Box::new(move || read().map_err(|e| e.to_string())),
            current: ArcSwap::from_pointee(current),
            looked: Mutex::new(Looked {
                at: Instant::now(),
                stamps,
                told: String::new(),
            }),
        }))
    }

    /// What the files say now.
    pub async fn current(self: &Arc<Self>) -> Arc<T> {
        let due = {
            let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
            looked.at.elapsed() >= LOOK_EVERY
        };
        if due {
            let this = Arc::clone(self);
            // A file system that does not answer holds up nobody else.
            let _ = tokio::task::spawn_blocking(move || this.look()).await;
        }
        self.last()
    }

    /// What the files said last.
    pub fn last(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Takes up changed files, unless they were looked at just now. Those that cannot be used (of a
    /// pair only one may be there yet) are told of, and tried again at the next look.
    pub fn look(&self) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked.at.elapsed() < LOOK_EVERY {
            return;
        }
        looked.at = Instant::now();
        let stamps = stamps(&self.files);
        if stamps == looked.stamps {
            return;
        }
        match (self.read)() {
            Ok(read) => {
                tracing::info!("{} were read again", self.what);
                self.current.store(Arc::new(read));
                looked.stamps = stamps;
                looked.told.clear();
            }
            Err(error) => {
                if looked.told != error {
                    tracing::warn!(%error, "changed {} are not taken up", self.what);
                    looked.told = error;
                }
            }
        }
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |metadata: Metadata| Stamp {
        inode: metadata.ino(),
        bytes: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    };
    // One that is not there differs from all that were read.
    let found = files.iter().filter_map(|path| std::fs::metadata(path).ok());
    found.map(stamp).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn number(path: &PathBuf) -> Result<u32, String> {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        text.parse().map_err(|_| "no number".to_owned())
    }

    /// As if the last look was long ago.
    fn look(reloaded: &Reloaded<u32>) {
        reloaded.looked.lock().unwrap().at -= LOOK_EVERY;
        reloaded.look();
    }

    #[test]
    fn a_changed_file_is_read_and_a_wrong_one_is_not_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        let open = || {
            let path = path.clone();
            Reloaded::open("numbers", vec![path.clone()], move || number(&path))
        };
        assert!(open().is_err());
        std::fs::write(&path, "1").unwrap();
        let reloaded = open().unwrap();
        std::fs::write(&path, "22").unwrap();
        assert_eq!(*reloaded.last(), 1, "not looked at yet");
        look(&reloaded);
        assert_eq!(*reloaded.last(), 22);
        std::fs::write(&path, "none").unwrap();
        look(&reloaded);
        assert_eq!(*reloaded.last(), 22);
        std::fs::remove_file(&path).unwrap();
        look(&reloaded);
        assert_eq!(*reloaded.last(), 22);
        std::fs::write(&path, "333").unwrap();
        look(&reloaded);
        assert_eq!(*reloaded.last(), 333);
    }
}
