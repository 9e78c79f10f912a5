//! Reading all records of a prefix, by pages of one revision.

use etcd_client::GetOptions;

use super::{
    Inner,
    members::{CallError, Patience},
};
use crate::store::{Record, StoreError};

/// Keys of one page; with values of 64 KiB at most, a page may still be large.
const PAGE: i64 = 1000;
/// The largest page that is taken.
const MAX_PAGE_BYTES: usize = 80 << 20;

impl Inner {
    pub(super) async fn load(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        let own = self.keys.record("").len();
        loop {
            match self.pages(&self.keys.record(prefix), own).await {
                // So slowly that etcd has forgotten the revision of the first page.
                Err(CallError::Compacted) => {}
                read => return read.map_err(|e| e.into_store("read the state")),
            }
        }
    }

    async fn pages(&self, prefix: &str, own: usize) -> Result<Vec<Record>, CallError> {
        let end = end_of(prefix.as_bytes());
        let mut records = Vec::new();
        let mut from = prefix.as_bytes().to_vec();
        let mut revision = 0;
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE)
                .with_revision(revision);
            let mut page = self
                .members
                .call(Patience::Endless, |client| {
                    let (from, options) = (from.clone(), options.clone());
                    async move {
                        let mut kv = client.kv_client().max_decoding_message_size(MAX_PAGE_BYTES);
                        kv.get(from, Some(options)).await
                    }
                })
                .await?;
            if revision == 0 {
                revision = page
                    .header()
                    .map_or(0, etcd_client::ResponseHeader::revision);
            }
            let more = page.more();
            for kv in page.take_kvs() {
                let (key, value) = kv.into_key_value();
                from.clone_from(&key);
                let key = String::from_utf8_lossy(key.get(own..).unwrap_or_default());
                records.push((key.into_owned(), value));
            }
            if !more {
                return Ok(records);
            }
            // The key right after the last one.
            from.push(0);
        }
    }
}

/// The first key after all those that begin with `prefix`.
pub(super) fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}
