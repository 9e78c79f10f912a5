//! The worker's cache of blobs: bounded by bytes, least recently used first, by digest.
//!
//! A blob is a read-only file named by its digest. It was checked when it came in; what is found
//! after a restart, or was touched by somebody since, is hashed again before it is used. What is in
//! use is pinned and never evicted. Downloads of one digest at the same time are one download.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::MetadataExt as _,
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
    hit: bool,
}

impl Pinned {
    /// Whether it was here already.
    pub const fn is_hit(&self) -> bool {
        self.hit
    }

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
            hit: true,
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
            hit: false,
        }
    }

    /// Keeps a file that was just stored, so that the next stage here need not fetch it. The file
    /// must not be written to any more. Does nothing if that cannot be done, nor with a file that
    /// stands elsewhere, too: it is not ours, and whoever has it may go on writing to it.
    pub async fn keep(self: &Arc<Self>, digest: &Digest, bytes: u64, file: &Path) {
        if !fs::symlink_metadata(file).is_ok_and(|meta| meta.is_file() && meta.nlink() == 1) {
            return;
        }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    struct Fixture {
        store: ArtifactStore,
        objects: tempfile::TempDir,
        dir: tempfile::TempDir,
    }

    fn fixture() -> Fixture {
        let objects = tempfile::tempdir().unwrap();
        Fixture {
            store: ArtifactStore::open(&format!("file://{}", objects.path().display())).unwrap(),
            objects,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    impl Fixture {
        fn cache(&self, max_bytes: u64) -> Arc<Cache> {
            Cache::open(self.dir.path(), max_bytes).unwrap()
        }

        async fn blob(&self, text: &str) -> Digest {
            self.store.put_bytes(text.to_owned().into()).await.unwrap()
        }

        /// After this, only what is cached can still be read.
        fn lose_objects(&self) {
            fs::remove_dir_all(self.objects.path().join("cas")).unwrap();
        }
    }

    #[tokio::test]
    async fn the_least_recently_used_goes_first_and_what_is_in_use_stays() {
        let fixture = fixture();
        let cache = fixture.cache(10);
        let (a, b, c) = (
            fixture.blob("aaaa").await,
            fixture.blob("bbbb").await,
            fixture.blob("cccc").await,
        );
        let held = cache.get(&fixture.store, &a, 4).await.unwrap();
        drop(cache.get(&fixture.store, &b, 4).await.unwrap());
        drop(cache.get(&fixture.store, &c, 4).await.unwrap());
        assert_eq!(cache.bytes(), 8);
        fixture.lose_objects();
        assert_eq!(fs::read(held.path()).unwrap(), b"aaaa");
        assert!(
            cache.get(&fixture.store, &a, 4).await.is_ok(),
            "it was in use"
        );
        assert!(
            cache.get(&fixture.store, &c, 4).await.is_ok(),
            "it came last"
        );
        assert!(
            cache.get(&fixture.store, &b, 4).await.is_err(),
            "it had to go"
        );
    }

    #[tokio::test]
    async fn what_is_larger_than_the_cache_is_there_only_while_it_is_used() {
        let fixture = fixture();
        let cache = fixture.cache(3);
        let a = fixture.blob("aaaa").await;
        let held = cache.get(&fixture.store, &a, 4).await.unwrap();
        assert_eq!(fs::read(held.path()).unwrap(), b"aaaa");
        drop(held);
        assert_eq!(cache.bytes(), 0);
    }

    #[tokio::test]
    async fn it_survives_a_restart_and_a_half_written_file_does_not() {
        let fixture = fixture();
        let a = fixture.blob("aaaa").await;
        drop(fixture.cache(10).get(&fixture.store, &a, 4).await.unwrap());
        let half = fixture
            .dir
            .path()
            .join("blobs")
            .join(format!("{a}.0.partial"));
        fs::write(&half, "aa").unwrap();
        fixture.lose_objects();
        let cache = fixture.cache(10);
        assert!(cache.get(&fixture.store, &a, 4).await.is_ok());
        assert_eq!(cache.bytes(), 4);
        assert!(!half.exists());
    }

    #[tokio::test]
    async fn a_file_that_was_damaged_is_fetched_again() {
        use std::os::unix::fs::PermissionsExt;
        let fixture = fixture();
        let a = fixture.blob("aaaa").await;
        for restart in [false, true] {
            let cache = fixture.cache(10);
            let path = cache
                .get(&fixture.store, &a, 4)
                .await
                .unwrap()
                .path()
                .to_path_buf();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            fs::write(&path, "aaab").unwrap();
            let later = SystemTime::now() + std::time::Duration::from_secs(5);
            fs::File::open(&path).unwrap().set_modified(later).unwrap();
            let cache = if restart { fixture.cache(10) } else { cache };
            let again = cache.get(&fixture.store, &a, 4).await.unwrap();
            assert_eq!(fs::read(again.path()).unwrap(), b"aaaa");
        }
    }

    #[tokio::test]
    async fn a_file_that_stands_elsewhere_too_is_not_kept_and_stays_writable() {
        let fixture = fixture();
        let cache = fixture.cache(10);
        let at = |name: &str| fixture.dir.path().join(name);
        fs::write(at("theirs"), "aaaa").unwrap();
        fs::hard_link(at("theirs"), at("output")).unwrap();
        std::os::unix::fs::symlink(at("theirs"), at("link")).unwrap();
        for name in ["output", "link"] {
            cache.keep(&Digest::of(b"aaaa"), 4, &at(name)).await;
            assert_eq!(cache.bytes(), 0, "{name}");
        }
        let theirs = fs::metadata(at("theirs")).unwrap();
        assert!(!theirs.permissions().readonly());
        fs::write(at("own"), "aaaa").unwrap();
        cache.keep(&Digest::of(b"aaaa"), 4, &at("own")).await;
        assert_eq!(cache.bytes(), 4);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_want_one_blob_share_one_download() {
        let fixture = fixture();
        let cache = fixture.cache(1 << 30);
        let text = "x".repeat(1 << 20);
        let a = fixture.blob(&text).await;
        let all = (0..16).map(|_| {
            let (cache, store) = (cache.clone(), fixture.store.clone());
            tokio::spawn(async move { cache.get(&store, &a, 1 << 20).await })
        });
        let all: Vec<Pinned> = futures::future::join_all(all)
            .await
            .into_iter()
            .map(|pinned| pinned.unwrap().unwrap())
            .collect();
        assert_eq!(all.len(), 16);
        assert_eq!(cache.bytes(), 1 << 20);
        assert_eq!(cache.lock().clock, 16, "one came in, fifteen found it");
    }

    #[tokio::test]
    async fn a_corrupted_object_is_refused_and_not_kept() {
        let fixture = fixture();
        let a = fixture.blob("aaaa").await;
        let object = fixture.objects.path().join(ArtifactStore::key(&a).as_ref());
        fs::write(object, "aaab").unwrap();
        let cache = fixture.cache(10);
        let error = cache.get(&fixture.store, &a, 4).await.unwrap_err();
        assert_eq!(error.bad_digest(), Some(a));
        assert_eq!(
            fs::read_dir(fixture.dir.path().join("blobs"))
                .unwrap()
                .count(),
            0
        );
    }

    #[tokio::test]
    async fn a_full_disk_is_told_as_such_and_heals_when_there_is_room() {
        let fixture = fixture();
        let full = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(full.path())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            // Not allowed here: nothing can be said.
            return;
        }
        let cache = Cache::open(full.path(), 1 << 30).unwrap();
        let large = fixture.blob(&"l".repeat(4 << 20)).await;
        let small = fixture.blob(&"s".repeat(700 << 10)).await;
        let other = fixture.blob(&"o".repeat(700 << 10)).await;
        let told = cache.get(&fixture.store, &large, 4 << 20).await;
        let first = cache.get(&fixture.store, &small, 700 << 10).await.map(drop);
        // Room is made by what is not in use.
        let second = cache.get(&fixture.store, &other, 700 << 10).await.map(drop);
        let status = std::process::Command::new("umount")
            .arg("-l")
            .arg(full.path())
            .status();
        assert!(status.unwrap().success());
        assert!(
            matches!(told, Err(ArtifactError::DiskFull { .. })),
            "{told:?}"
        );
        assert!(first.is_ok(), "{first:?}");
        assert!(second.is_ok(), "{second:?}");
    }
}
