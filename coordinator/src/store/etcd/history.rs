//! Every version of every record, for those who judge a cluster from the outside.
//!
//! etcd keeps old versions until it is compacted; so the history is whole only on a cluster whose
//! leader compacts nothing.

use etcd_client::{EventType, GetOptions, SortOrder, SortTarget, WatchOptions};
use tokio::time::{Duration, timeout};

use super::{EtcdStore, members::Patience};
use crate::store::StoreError;

/// How long the next part of the history may take.
const NEXT_WITHIN: Duration = Duration::from_secs(10);

/// One change of one record.
#[derive(Debug, Clone)]
pub struct Change {
    /// The revision of the transaction that made it.
    pub revision: i64,
    /// The record's key.
    pub key: String,
    /// Its new value; `None` if it was removed.
    pub value: Option<Vec<u8>>,
}

impl EtcdStore {
    /// Every change of the records from the beginning until now, in order.
    ///
    /// # Errors
    /// [`StoreError::Failed`], also if etcd has compacted a part of it.
    pub async fn history(&self) -> Result<Vec<Change>, StoreError> {
        let what = "read the history";
        let failed = |text: String| StoreError::failed(what, text);
        let inner = &self.inner;
        // Each transaction writes `commit`, so its revision is that of the last change.
        let commit = inner.keys.commit.clone();
        let last = inner
            .members
            .call(Patience::Endless, |client| {
                let key = commit.clone();
                let newest = GetOptions::new().with_sort(SortTarget::Mod, SortOrder::Descend);
                async move { client.kv_client().get(key, Some(newest)).await }
            })
            .await
            .map_err(|e| e.into_store(what))?;
        let Some(until) = last.kvs().first().map(etcd_client::KeyValue::mod_revision) else {
            return Ok(Vec::new());
        };
        let (_, client) = inner
            .members
            .streaming()
            .await
            .map_err(|e| failed(e.to_string()))?;
        let options = WatchOptions::new().with_prefix().with_start_revision(1);
        let mut watching = client
            .watch_client()
            .max_decoding_message_size(usize::MAX)
            .watch(format!("{}/", inner.keys.prefix), Some(options))
            .await
            .map_err(|e| failed(e.to_string()))?;
        let own = inner.keys.record("");
        let mut changes = Vec::new();
        loop {
            let next = timeout(NEXT_WITHIN, watching.message()).await;
            let next = next.map_err(|_| failed("etcd sends no more of it".to_owned()))?;
            let Some(response) = next.map_err(|e| failed(e.to_string()))? else {
                return Err(failed("etcd ended it".to_owned()));
            };
            if response.canceled() {
                return Err(failed("etcd has compacted a part of it".to_owned()));
            }
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                let key = String::from_utf8_lossy(kv.key());
                if let Some(key) = key.strip_prefix(own.as_str()) {
                    let put = event.event_type() == EventType::Put;
                    changes.push(Change {
                        revision: kv.mod_revision(),
                        key: key.to_owned(),
                        value: put.then(|| kv.value().to_vec()),
                    });
                }
                // It is the last operation of its transaction.
                if key == commit && kv.mod_revision() >= until {
                    return Ok(changes);
                }
            }
        }
    }
}
