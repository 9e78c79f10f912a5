//! The store for one machine: one file, one process, one thread that reads and writes it.
//!
//! It is built on redb, which answers a commit only after an fsync. Every operation runs on the
//! store's own thread, never on a thread of the async runtime. Whoever holds the file may lead:
//! there is no lease, since the operating system frees the file's lock with its holder. The *epoch*
//! counts the campaigns; a later campaign deposes the earlier leader.

use std::{
    fs,
    io::ErrorKind,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use emberline_common::ids::Epoch;
use futures::future::BoxFuture;
use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{mpsc, oneshot, watch};

use super::{BatchLimits, Candidate, Leader, Record, StateStore, StoreError};
use crate::engine::api::Write;

const STATE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("state");
const LEADERSHIP: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("leadership");
const LEADER: &str = "leader";
const CAMPAIGNS: &str = "campaigns";

/// Pages kept in memory.
const PAGE_CACHE_BYTES: usize = 32 << 20;
/// Operations that wait for the thread; the runtime never has more than two under way.
const QUEUE: usize = 64;

type Job = Box<dyn FnOnce(&mut Files) + Send>;

/// A [`StateStore`] in one file. Dropping it waits for what is under way and frees the file.
pub struct EmbeddedStore {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    leader: watch::Receiver<Option<Leader>>,
}

impl EmbeddedStore {
    /// Opens the file, and makes it if there is none. After a crash it is repaired first. Every
    /// page is checked, so that a damaged file is refused here and not in the middle of a run.
    ///
    /// # Errors
    /// [`StoreError::Held`], [`StoreError::Corrupted`], [`StoreError::Full`] or
    /// [`StoreError::Failed`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_owned();
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        let (leader_tx, leader) = watch::channel(None);
        let (opened_tx, opened) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("emberline-store".to_owned())
            .spawn(move || {
                let mut files = match Files::open(path, leader_tx) {
                    Ok(files) => files,
                    Err(e) => {
                        let _ = opened_tx.send(Err(e));
                        return;
                    }
                };
                if opened_tx.send(Ok(())).is_err() {
                    return;
                }
                while let Some(job) = queue.blocking_recv() {
                    job(&mut files);
                }
            })
            .map_err(|e| StoreError::Failed {
                what: "start its thread",
                source: Arc::new(e),
            })?;
        let store = Self {
            jobs: Some(jobs),
            thread: Some(thread),
            leader,
        };
        opened.await.map_err(|_| StoreError::Closed)??;
        Ok(store)
    }

    /// Runs `job` on the store's thread.
    fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Files) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        let jobs = self.jobs.clone();
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let job: Job = Box::new(move |files| {
                let _ = answer.send(files.guarded(job));
            });
            let jobs = jobs.ok_or(StoreError::Closed)?;
            jobs.send(job).await.map_err(|_| StoreError::Closed)?;
            answered.await.map_err(|_| StoreError::Closed)?
        })
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Its panics are caught; there is nothing more to learn from the result.
            let _ = thread.join();
        }
    }
}

impl StateStore for EmbeddedStore {
    fn load(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<Record>, StoreError>> {
        let prefix = prefix.to_owned();
        self.run(move |files| files.load(&prefix))
    }

    fn commit(&self, epoch: Epoch, writes: Vec<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(move |files| files.commit(epoch, &writes))
    }

    fn campaign(&self, candidate: Candidate) -> BoxFuture<'_, Result<Epoch, StoreError>> {
        self.run(move |files| files.campaign(candidate))
    }

    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        self.run(move |files| files.resign(epoch))
    }

    fn leader(&self) -> BoxFuture<'_, Result<Option<Leader>, StoreError>> {
        let leader = self.leader.borrow().clone();
        Box::pin(async move { Ok(leader) })
    }

    fn watch_leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.clone()
    }

    fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            records: 10_000,
            bytes: 4 << 20,
        }
    }
}

/// What the thread owns.
struct Files {
    path: PathBuf,
    database: Database,
    leader: watch::Sender<Option<Leader>>,
}

impl Files {
    fn open(path: PathBuf, leader: watch::Sender<Option<Leader>>) -> Result<Self, StoreError> {
        let at = |what: &'static str| {
            move |e: std::io::Error| StoreError::Failed {
                what,
                source: Arc::new(e),
            }
        };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&directory).map_err(at("make its directory"))?;
        let opened = catch_unwind(AssertUnwindSafe(|| {
            Database::builder()
                .set_cache_size(PAGE_CACHE_BYTES)
                .set_check_integrity_on_open(true)
                .create(&path)
        }));
        let database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => {
                return Err(StoreError::Held {
                    holder: read_holder(&path),
                    path: path.display().to_string(),
                });
            }
            Ok(Err(e)) => return Err(translate(&path, "open the file", redb::Error::from(e))),
            Err(_) => return Err(damaged(&path, "its pages contradict each other")),
        };
        write_holder(&path);
        let mut files = Self {
            path,
            database,
            leader,
        };
        files.guarded(Self::prepare)?;
        // The file's name must be as durable as its content.
        fs::File::open(&directory)
            .and_then(|d| d.sync_all())
            .map_err(at("sync its directory"))?;
        Ok(files)
    }

    /// Runs `job`; a panic inside redb (a damaged page) becomes an error.
    fn guarded<T>(
        &mut self,
        job: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        catch_unwind(AssertUnwindSafe(|| job(self)))
            .unwrap_or_else(|_| Err(damaged(&self.path, "its pages contradict each other")))
    }

    /// Makes the tables. Nobody leads: the process that led has ended, since we hold the file.
    fn prepare(&mut self) -> Result<(), StoreError> {
        self.try_do("prepare the file", |database| {
            let txn = database.begin_write()?;
            txn.open_table(STATE)?;
            txn.open_table(LEADERSHIP)?.remove(LEADER)?;
            txn.commit()?;
            Ok(())
        })
    }

    fn load(&mut self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.try_do("read", |database| {
            let table = database.begin_read()?.open_table(STATE)?;
            let mut records = Vec::new();
            for entry in table.range(prefix..)? {
                let (key, value) = entry?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                records.push((key.value().to_owned(), value.value().to_vec()));
            }
            Ok(records)
        })
    }

    fn commit(&mut self, epoch: Epoch, writes: &[Write]) -> Result<(), StoreError> {
        let done = self.try_do("commit", |database| {
            let mut txn = database.begin_write()?;
            txn.set_durability(Durability::Immediate)?;
            let stored = txn
                .open_table(LEADERSHIP)?
                .get(LEADER)?
                .map(|v| v.value().to_vec());
            let stored = stored.and_then(|v| serde_json::from_slice::<Leader>(&v).ok());
            if stored.map(|l| l.epoch) != Some(epoch) {
                txn.abort()?;
                return Ok(false);
            }
            {
                let mut table = txn.open_table(STATE)?;
                for write in writes {
                    match write {
                        Write::Put { key, value } => {
                            table.insert(key.as_str(), value.as_slice())?;
                        }
                        Write::Delete { key } => {
                            table.remove(key.as_str())?;
                        }
                        Write::DeletePrefix { prefix } => {
                            table
                                .retain_in(prefix.as_str().., |key, _| !key.starts_with(prefix))?;
                        }
                    }
                }
            }
            txn.commit()?;
            Ok(true)
        })?;
        if done {
            Ok(())
        } else {
            Err(StoreError::Deposed { epoch })
        }
    }

    fn campaign(&mut self, candidate: Candidate) -> Result<Epoch, StoreError> {
        let leader = self.try_do("campaign", |database| {
            let txn = database.begin_write()?;
            let leader = {
                let mut table = txn.open_table(LEADERSHIP)?;
                let campaigns = table.get(CAMPAIGNS)?.map(|v| v.value().to_vec());
                let campaigns = match campaigns {
                    None => 0,
                    Some(bytes) => u64::from_be_bytes(bytes.try_into().map_err(|_| {
                        redb::Error::Corrupted("the number of campaigns has no 8 bytes".to_owned())
                    })?),
                };
                let leader = Leader {
                    name: candidate.name,
                    address: candidate.address,
                    epoch: Epoch(campaigns + 1),
                };
                table.insert(CAMPAIGNS, leader.epoch.0.to_be_bytes().as_slice())?;
                let value = serde_json::to_vec(&leader)
                    .map_err(|e| redb::Error::Corrupted(e.to_string()))?;
                table.insert(LEADER, value.as_slice())?;
                leader
            };
            txn.commit()?;
            Ok(leader)
        })?;
        let epoch = leader.epoch;
        self.leader.send_replace(Some(leader));
        Ok(epoch)
    }

    fn resign(&mut self, epoch: Epoch) -> Result<(), StoreError> {
        let leads = self.leader.borrow().as_ref().map(|l| l.epoch) == Some(epoch);
        if !leads {
            return Ok(());
        }
        self.try_do("resign", |database| {
            let txn = database.begin_write()?;
            txn.open_table(LEADERSHIP)?.remove(LEADER)?;
            txn.commit()?;
            Ok(())
        })?;
        self.leader.send_replace(None);
        Ok(())
    }

    fn try_do<T>(
        &self,
        what: &'static str,
        job: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        job(&self.database).map_err(|e| translate(&self.path, what, e))
    }
}

fn damaged(path: &Path, what: &str) -> StoreError {
    StoreError::Corrupted {
        path: path.display().to_string(),
        what: what.to_owned(),
    }
}

fn translate(path: &Path, what: &'static str, e: redb::Error) -> StoreError {
    match e {
        redb::Error::Corrupted(what) => damaged(path, &what),
        redb::Error::UpgradeRequired(version) => damaged(
            path,
            &format!("its file format is the old version {version}"),
        ),
        redb::Error::Io(e)
            if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) =>
        {
            StoreError::Full {
                path: path.display().to_string(),
            }
        }
        redb::Error::Io(e)
            if matches!(e.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            damaged(path, &e.to_string())
        }
        redb::Error::PreviousIo | redb::Error::DatabaseClosed => StoreError::Closed,
        e => StoreError::Failed {
            what,
            source: Arc::new(e),
        },
    }
}

/// The file beside the state that says who holds it. Only its text is used, and only while the
/// lock is held; so it may be stale or missing.
fn holder_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".holder");
    PathBuf::from(name)
}

fn write_holder(path: &Path) {
    let text = format!("process {}", std::process::id());
    // Without it an error message is less helpful, nothing else.
    let _ = fs::write(holder_path(path), text);
}

fn read_holder(path: &Path) -> String {
    fs::read_to_string(holder_path(path))
        .ok()
        .map(|text| text.trim().chars().take(80).collect::<String>())
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| "another process".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::{super::conformance, *};

    struct OneFile(tempfile::TempDir);

    impl conformance::Harness for OneFile {
        fn open(&self) -> BoxFuture<'_, Arc<dyn StateStore>> {
            Box::pin(async {
                let store = EmbeddedStore::open(self.0.path().join("state.redb")).await;
                Arc::new(store.unwrap()) as Arc<dyn StateStore>
            })
        }

        fn depose<'a>(&'a self, store: &'a dyn StateStore) -> BoxFuture<'a, ()> {
            Box::pin(async {
                store
                    .campaign(conformance::candidate("usurper"))
                    .await
                    .unwrap();
            })
        }
    }

    #[tokio::test]
    async fn the_embedded_store_conforms() {
        for (name, test) in conformance::tests() {
            eprintln!("conformance: {name}");
            test(&OneFile(tempfile::tempdir().unwrap())).await;
        }
    }

    #[tokio::test]
    async fn a_second_process_is_told_who_holds_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let _first = EmbeddedStore::open(&path).await.unwrap();
        let error = EmbeddedStore::open(&path).await.err().unwrap();
        assert!(matches!(error, StoreError::Held { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(&std::process::id().to_string()), "{text}");
    }

    #[tokio::test]
    async fn a_file_that_is_none_of_ours_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        fs::write(&path, "not a database, only some text".repeat(500)).unwrap();
        let error = EmbeddedStore::open(&path).await.err().unwrap();
        assert!(matches!(error, StoreError::Corrupted { .. }), "{error}");
        assert!(!error.to_string().contains('\n'));
    }

    #[tokio::test]
    async fn a_flipped_bit_is_found_when_the_file_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        {
            let store = EmbeddedStore::open(&path).await.unwrap();
            let epoch = store.campaign(conformance::candidate("a")).await.unwrap();
            let writes = (0..200).map(|i| Write::Put {
                key: format!("tasks/r/{i:04}"),
                value: b"needle-in-the-page".repeat(20),
            });
            store.commit(epoch, writes.collect()).await.unwrap();
        }
        let mut bytes = fs::read(&path).unwrap();
        let needle = b"needle-in-the-page";
        let mut flipped = 0;
        for i in 0..bytes.len() - needle.len() {
            if &bytes[i..i + needle.len()] == needle {
                bytes[i + 3] ^= 0x20;
                flipped += 1;
            }
        }
        assert!(flipped > 0, "the values are in the file");
        fs::write(&path, bytes).unwrap();
        let error = EmbeddedStore::open(&path).await.err().unwrap();
        assert!(matches!(error, StoreError::Corrupted { .. }), "{error}");
    }
}
