//! Trying a store out: every operation that is used, once, with how long it took. What it writes lies
//! below `staging/`, so that the collector finds what a broken probe leaves.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    ObjectStore, ObjectStoreExt, PutMode, aws::S3ConditionalPut, path::Path, prefix::PrefixStore,
};
use url::Url;

use super::{
    ArtifactError, ArtifactStore, Explanation, Patience, explain,
    patience::Traffic,
    s3::open_bucket,
    store::{PART_BYTES, prefix_of},
};

/// Small enough for one request, and no text that could be there by chance.
const CONTENT: &[u8] = b"emberline has written this to see whether it can";

/// What was found out about a store.
#[derive(Debug)]
pub struct Probe {
    /// What was tried, in order. Where listing or writing fails the others are not tried.
    pub steps: Vec<ProbeStep>,
    /// How many seconds the server's clock is ahead of this machine's, where it said its time.
    pub server_ahead_seconds: Option<i64>,
}

/// One operation.
#[derive(Debug)]
pub struct ProbeStep {
    /// What it was.
    pub what: &'static str,
    /// How long it took.
    pub took: Duration,
    /// What was found, or why it failed.
    pub outcome: Result<String, Explanation>,
}

/// The same store, tried with little patience.
struct Target {
    store: Arc<dyn ObjectStore>,
    /// The same with conditional writes, which are asked for nowhere else.
    conditional: Arc<dyn ObjectStore>,
    traffic: Option<Arc<Traffic>>,
}

impl ArtifactStore {
    /// Tries every operation that is used. Conditional writes are used nowhere: how the store answers
    /// one is only told.
    ///
    /// # Errors
    /// [`ArtifactError::Url`]; what the store refuses is in the steps.
    pub async fn probe(&self) -> Result<Probe, ArtifactError> {
        let target = self.target()?;
        let mut steps = Vec::new();
        let keys: [Path; 3] = std::array::from_fn(|_| self.probe_key());
        let (small, copy, large) = (&keys[0], &keys[1], &keys[2]);
        let store = &target.store;

        // First, for some servers make a bucket that is not there when something is put into it.
        step(&mut steps, "list", list(store)).await;
        if steps.iter().all(|s| s.outcome.is_ok()) {
            step(&mut steps, "write", write(store, small)).await;
        }
        if steps.iter().all(|s| s.outcome.is_ok()) {
            step(&mut steps, "look up", look_up(store, small)).await;
            step(&mut steps, "read", read(store, small)).await;
            step(&mut steps, "read a range", read_range(store, small)).await;
            step(&mut steps, "copy", copy_and_read(store, small, copy)).await;
            step(&mut steps, "write in parts", write_parts(store, large)).await;
            step(&mut steps, "give an upload up", give_up(store, large)).await;
            step(&mut steps, "delete", delete(store, &keys)).await;
            let conditional = &target.conditional;
            step(
                &mut steps,
                "conditional write",
                condition(conditional, small),
            )
            .await;
        }
        Ok(Probe {
            steps,
            server_ahead_seconds: target.traffic.and_then(|t| t.server_ahead_seconds()),
        })
    }

    /// Lists, writes, reads and deletes one small object: what a coordinator must be able to do before it may
    /// promise anything. With little patience, for somebody waits for it.
    ///
    /// # Errors
    /// [`ArtifactError::Store`] if the store refuses one of these.
    pub async fn probe_write(&self) -> Result<(), ArtifactError> {
        let Target { store, .. } = self.target()?;
        let key = self.probe_key();
        let failed = |what: &str, e| ArtifactError::store(self.url(), what, e);
        list(&*store).await.map_err(|e| failed("list it", e))?;
        let put = store.put(&key, Bytes::from_static(CONTENT).into()).await;
        put.map_err(|e| failed("write to it", e))?;
        let read = async { store.get(&key).await?.bytes().await };
        let read = read.await.map_err(|e| failed("read what was written", e))?;
        if read != CONTENT {
            let why = "what was written is read back as something else";
            return Err(failed("trust it", generic(why)));
        }
        let deleted = store.delete(&key).await;
        deleted.map_err(|e| failed("delete what was written", e))
    }

    fn target(&self) -> Result<Target, ArtifactError> {
        let Some(environment) = &self.s3 else {
            return Ok(Target {
                store: self.raw(),
                conditional: self.raw(),
                traffic: None,
            });
        };
        let fail = |why: String| ArtifactError::Url {
            url: self.url().to_owned(),
            why,
        };
        let url = Url::parse(self.url()).map_err(|e| fail(e.to_string()))?;
        let open = |conditional| {
            open_bucket(self.url(), environment, Patience::short(), conditional).map_err(fail)
        };
        let below = |bucket| Arc::new(PrefixStore::new(bucket, prefix_of(&url)));
        let plain = open(S3ConditionalPut::Disabled)?;
        let conditional = open(S3ConditionalPut::ETagMatch)?;
        Ok(Target {
            store: below(plain.store),
            conditional: below(conditional.store),
            traffic: Some(plain.traffic),
        })
    }

    fn probe_key(&self) -> Path {
        let now = crate::time::Timestamp::now().0;
        let name = format!(
            "probe-{now:x}-{:x}-{:x}",
            std::process::id(),
            self.next_number()
        );
        Path::from_iter(["staging", &name])
    }
}

type Outcome = object_store::Result<String>;

async fn step(
    steps: &mut Vec<ProbeStep>,
    what: &'static str,
    tried: impl Future<Output = Outcome>,
) {
    let start = Instant::now();
    let outcome = tried.await.map_err(|e| explain(&e));
    steps.push(ProbeStep {
        what,
        took: start.elapsed(),
        outcome,
    });
}

fn generic(why: &'static str) -> object_store::Error {
    object_store::Error::Generic {
        store: "probe",
        source: why.into(),
    }
}

fn same(found: &[u8], expected: &[u8]) -> Outcome {
    if found == expected {
        Ok(format!("{} bytes", found.len()))
    } else {
        Err(generic("other bytes came back than were written"))
    }
}

async fn write(store: &dyn ObjectStore, key: &Path) -> Outcome {
    store.put(key, Bytes::from_static(CONTENT).into()).await?;
    Ok(format!("{} bytes", CONTENT.len()))
}

async fn look_up(store: &dyn ObjectStore, key: &Path) -> Outcome {
    let size = store.head(key).await?.size;
    if size == CONTENT.len() as u64 {
        Ok(format!("{size} bytes"))
    } else {
        Err(generic("it tells another size than was written"))
    }
}

async fn read(store: &dyn ObjectStore, key: &Path) -> Outcome {
    same(&store.get(key).await?.bytes().await?, CONTENT)
}

async fn read_range(store: &dyn ObjectStore, key: &Path) -> Outcome {
    same(&store.get_range(key, 10..13).await?, &CONTENT[10..13])
}

/// One page is enough.
async fn list(store: &dyn ObjectStore) -> Outcome {
    let mut found = store.list(Some(&Path::from("staging")));
    match found.try_next().await? {
        Some(_) => Ok("something is in staging".to_owned()),
        None => Ok("nothing is in staging".to_owned()),
    }
}

async fn copy_and_read(store: &dyn ObjectStore, from: &Path, to: &Path) -> Outcome {
    store.copy(from, to).await?;
    read(store, to).await
}

async fn write_parts(store: &dyn ObjectStore, key: &Path) -> Outcome {
    let part: Vec<u8> = (0..PART_BYTES).map(|i| (i % 251) as u8).collect();
    let mut upload = store.put_multipart(key).await?;
    let parts = [
        upload.put_part(Bytes::copy_from_slice(&part).into()),
        upload.put_part(Bytes::from_static(CONTENT).into()),
    ];
    futures::future::try_join_all(parts).await?;
    upload.complete().await?;
    let whole = store.get(key).await?.bytes().await?;
    same(&whole, &[&part, CONTENT].concat())
}

async fn give_up(store: &dyn ObjectStore, key: &Path) -> Outcome {
    let mut upload = store.put_multipart(key).await?;
    upload.put_part(Bytes::from_static(CONTENT).into()).await?;
    upload.abort().await?;
    Ok("its parts are gone".to_owned())
}

async fn delete(store: &dyn ObjectStore, keys: &[Path]) -> Outcome {
    let all = futures::stream::iter(keys.to_vec()).map(Ok).boxed();
    let mut deleted = store.delete_stream(all);
    while let Some(outcome) = deleted.next().await {
        match outcome {
            // A step before it has failed, so this one was never written.
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    match store.head(&keys[0]).await {
        Err(object_store::Error::NotFound { .. }) => Ok(format!("{} objects", keys.len())),
        Err(e) => Err(e),
        Ok(_) => Err(generic("what was deleted is still there")),
    }
}

/// A second write that must not happen if conditions are heeded.
async fn condition(store: &dyn ObjectStore, key: &Path) -> Outcome {
    let create = || {
        store.put_opts(
            key,
            Bytes::from_static(CONTENT).into(),
            PutMode::Create.into(),
        )
    };
    let answer = match (create().await, create().await) {
        (Ok(_), Err(object_store::Error::AlreadyExists { .. })) => "heeded (not relied upon)",
        (Ok(_), Ok(_)) => "ignored: the second writer wins (not relied upon)",
        _ => "not supported (not relied upon)",
    };
    // Where nothing was written there is nothing to delete.
    let _ = store.delete(key).await;
    Ok(answer.to_owned())
}
