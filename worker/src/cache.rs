//! The worker's cache of blobs: bounded by bytes, least recently used first, by digest.
//!
//! A blob is a read-only file named by its digest. It was checked when it came in; what is found
//! after a restart, or was touched by somebody since, is hashed again before it is used. What is in
//! use is pinned and never evicted. Downloads of one digest at the same time are one download.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore, MAX_MANIFEST_BYTES, Manifest},
    ids::Digest,
};
use sha2::Digest as _;

/// Manifests that a worker tells its leader of.
const MANIFESTS_KEPT: usize = 1000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    max_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Digest, Entry>,
    /// From the least to the most recently used.
    order: BTreeMap<u64, Digest>,
    clock: u64,
    bytes: u64,
    downloads: HashMap<Digest, Arc<tokio::sync::Mutex<()>>>,
    /// The most recently used last.
    manifests: Vec<Digest>,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    used: u64,
    pins: u32,
    /// What the file looked like when its bytes were right; `None` after a restart.
    checked: Option<SystemTime>,
}

/// A blob that stays in the cache for as long as this lives.
#[derive(Debug)]
pub(crate) struct Pinned {
    cache: Arc<Cache>,
    digest: Digest,
    path: PathBuf,
}

impl Pinned {
    /// The read-only file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if let Some(entry) = state.entries.get_mut(&self.digest) {
            entry.pins -= 1;
        }
        self.cache.evict(&mut state, 0);
    }
}

impl Cache {
    /// Opens the cache in that directory with what an earlier life left there.
    pub fn open(dir: &Path, max_bytes: u64) -> io::Result<Arc<Self>> {
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs)?;
        fs::create_dir_all(dir.join("manifests"))?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&blobs)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            match entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            {
                Some(digest) if meta.is_file() => {
                    found.push((
                        meta.accessed().or_else(|_| meta.modified())?,
                        digest,
                        meta.len(),
                    ));
                }
                // A half-written download of a life that ended early.
                _ if meta.is_file() => fs::remove_file(entry.path())?,
                _ => {}
            }
        }
        found.sort_unstable();
        let mut state = State::default();
        for (_, digest, bytes) in found {
            state.clock += 1;
            state.order.insert(state.clock, digest);
            state.bytes += bytes;
            let entry = Entry {
                bytes,
                used: state.clock,
                pins: 0,
                checked: None,
            };
            state.entries.insert(digest, entry);
        }
        let mut manifests = Vec::new();
        for entry in fs::read_dir(dir.join("manifests"))? {
            let entry = entry?;
            if let Some(digest) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
                manifests.push((entry.metadata()?.modified()?, digest));
            }
        }
        manifests.sort_unstable();
        state.manifests = manifests.into_iter().map(|(_, digest)| digest).collect();
        let cache = Arc::new(Self {
            dir: dir.to_path_buf(),
            max_bytes,
            state: Mutex::new(state),
        });
        cache.evict(&mut cache.lock(), 0);
        Ok(cache)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs").join(digest.to_string())
    }

    /// Bytes in the cache.
    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Manifests that were used, most recently used first.
    pub fn manifests(&self) -> Vec<Digest> {
        self.lock().manifests.iter().rev().copied().collect()
    }

    /// A manifest, from here or from the store.
    pub async fn manifest(
        self: &Arc<Self>,
        store: &ArtifactStore,
        digest: &Digest,
    ) -> Result<Manifest, ArtifactError> {
        let path = self.dir.join("manifests").join(digest.to_string());
        let here = tokio::fs::read(&path).await.ok();
        let here = here.filter(|bytes| Digest::of(bytes) == *digest);
        let bytes = match here {
            Some(bytes) => bytes,
            None => {
                let bytes = store.get_bytes(digest, MAX_MANIFEST_BYTES).await?;
                // A cache that cannot be written is only slower.
                let _ = tokio::fs::write(&path, &bytes).await;
                bytes.to_vec()
            }
        };
        let refused = |why| ArtifactError::Manifest {
            digest: *digest,
            why,
        };
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| refused(e.to_string()))?;
        manifest.check().map_err(refused)?;
        self.used_manifest(digest);
        Ok(manifest)
    }

    /// Remembers that the files of a manifest are here.
    fn used_manifest(&self, digest: &Digest) {
        let mut state = self.lock();
        state.manifests.retain(|other| other != digest);
        state.manifests.push(*digest);
        if state.manifests.len() > MANIFESTS_KEPT {
            let oldest = state.manifests.remove(0);
            drop(state);
            let _ = fs::remove_file(self.dir.join("manifests").join(oldest.to_string()));
        }
    }

    /// A blob, from here or from the store.
    pub async fn get(
        self: &Arc<Self>,
        store: &ArtifactStore,
        digest: &Digest,
        bytes: u64,
    ) -> Result<Pinned, ArtifactError> {
        let one_at_a_time = {
            let mut state = self.lock();
            // What nobody waits for any more is forgotten here.
            state
                .downloads
                .retain(|_, lock| Arc::strong_count(lock) > 1);
            state.downloads.entry(*digest).or_default().clone()
        };
        let _turn = one_at_a_time.lock().await;
        if let Some(pinned) = self.take(digest, bytes).await {
            return Ok(pinned);
        }
        self.evict(&mut self.lock(), bytes);
        let path = self.path(digest);
        if let Err(e) = store.get_file(digest, bytes, &path).await {
            if !matches!(e, ArtifactError::DiskFull { .. }) {
                return Err(e);
            }
            // What is kept only to be faster makes room for what is needed.
            self.evict(&mut self.lock(), u64::MAX);
            store.get_file(digest, bytes, &path).await?;
        }
        let checked = seal(&path).map_err(|e| ArtifactError::io("make read-only", &path, e))?;
        Ok(self.insert(digest, bytes, checked, path))
    }

    /// What is there already, if its bytes are still the right ones.
    async fn take(self: &Arc<Self>, digest: &Digest, bytes: u64) -> Option<Pinned> {
        let path = self.path(digest);
        let checked = self.lock().entries.get(digest)?.checked;
        let modified = fs::metadata(&path)
            .ok()
            .filter(|meta| meta.len() == bytes)
            .and_then(|meta| meta.modified().ok());
        let right = match modified {
            None => false,
            Some(modified) if checked == Some(modified) => true,
            Some(_) => {
                let path = path.clone();
                let hashed = tokio::task::spawn_blocking(move || digest_of(&path)).await;
                hashed.is_ok_and(|found| found.is_ok_and(|found| found == *digest))
            }
        };
        let mut state = self.lock();
        if !right {
            tracing::warn!(%digest, "a cached object was damaged and is fetched again");
            remove(&mut state, digest);
            drop(state);
            let _ = fs::remove_file(&path);
            return None;
        }
        state.clock += 1;
        let now = state.clock;
        let entry = state.entries.get_mut(digest)?;
        let before = std::mem::replace(&mut entry.used, now);
        entry.pins += 1;
        entry.checked = modified;
        state.order.remove(&before);
        state.order.insert(now, *digest);
        Some(Pinned {
            cache: self.clone(),
            digest: *digest,
            path,
        })
    }

    fn insert(
        self: &Arc<Self>,
        digest: &Digest,
        bytes: u64,
        checked: SystemTime,
        path: PathBuf,
    ) -> Pinned {
        let mut state = self.lock();
        remove(&mut state, digest);
        state.clock += 1;
        let now = state.clock;
        state.order.insert(now, *digest);
        state.bytes += bytes;
        let entry = Entry {
            bytes,
            used: now,
            pins: 1,
            checked: Some(checked),
        };
        state.entries.insert(*digest, entry);
        Pinned {
            cache: self.clone(),
            digest: *digest,
            path,
        }
    }

    /// Keeps a file that was just stored, so that the next stage here need not fetch it. The file
    /// must not be written to any more. Does nothing if that cannot be done.
    pub async fn keep(self: &Arc<Self>, digest: &Digest, bytes: u64, file: &Path) {
        let lock = {
            let mut state = self.lock();
            if bytes > self.max_bytes || state.entries.contains_key(digest) {
                return;
            }
            state.downloads.entry(*digest).or_default().clone()
        };
        let _turn = lock.lock().await;
        if self.lock().entries.contains_key(digest) {
            return;
        }
        self.evict(&mut self.lock(), bytes);
        let path = self.path(digest);
        if fs::hard_link(file, &path).is_ok()
            && let Ok(checked) = seal(&path)
        {
            drop(self.insert(digest, bytes, checked, path));
        }
    }

    /// Removes the least recently used until there is room for that many more bytes.
    fn evict(&self, state: &mut State, room: u64) {
        let limit = self.max_bytes.saturating_sub(room);
        if state.bytes <= limit {
            return;
        }
        let oldest: Vec<Digest> = state.order.values().copied().collect();
        for digest in oldest {
            if state.bytes <= limit {
                return;
            }
            if state
                .entries
                .get(&digest)
                .is_some_and(|entry| entry.pins == 0)
            {
                remove(state, &digest);
                let _ = fs::remove_file(self.path(&digest));
            }
        }
    }
}

fn remove(state: &mut State, digest: &Digest) {
    if let Some(entry) = state.entries.remove(digest) {
        state.order.remove(&entry.used);
        state.bytes -= entry.bytes;
    }
}

/// Makes a file read-only, and says what it looks like from now on.
fn seal(path: &Path) -> io::Result<SystemTime> {
    let meta = fs::metadata(path)?;
    let mut permissions = meta.permissions();
    permissions.set_readonly(true);
    fs::set_permissions(path, permissions)?;
    meta.modified()
}

fn digest_of(path: &Path) -> io::Result<Digest> {
    let mut file = fs::File::open(path)?;
    let mut hasher = sha2::Sha256::new();
    let mut buffer = vec![0_u8; 256 << 10];
    loop {
        let read = io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            return Ok(Digest::from_hasher(hasher));
        }
        hasher.update(&buffer[..read]);
    }
}
