//! Guarded transactions.
//!
//! Each one compares the leader key's create revision (so that only the leader writes) and the
//! revision of `commit`, which each one also writes (so that each is applied once, however often it
//! was sent: when an answer is lost, it is sent again, and the second one finds itself done).
//!
//! What is too large for one transaction goes to the journal first, in pieces; then one transaction
//! says that all of it is there, and from then on it counts as committed; then it is applied. A
//! leader that dies in between leaves the rest to its successor ([`Inner::recover`]).

use std::collections::{HashSet, VecDeque};

use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, Txn, TxnOp, TxnResponse};
use serde::{Deserialize, Serialize};

use super::{
    Inner, MAX_BYTES, MAX_OPS,
    lease::{Term, revision_of},
    load::end_of,
    members::{CallError, Patience},
};
use crate::{engine::api::Write, store::StoreError};
use emberline_common::ids::Epoch;

/// Bytes of one piece of the journal: no value is over 64 KiB.
const PIECE_BYTES: usize = 60 << 10;

/// The last commit that stands under `commit`.
#[derive(Debug, Clone, Default)]
pub(super) struct LastCommit {
    /// The revision of the key, 0 if it is not there.
    revision: i64,
    note: Note,
}

/// The value of `commit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The term.
    epoch: u64,
    /// Counts the transactions of the term.
    number: u64,
    /// Pieces of the journal that are committed and may not be applied yet.
    #[serde(default, skip_serializing_if = "is_zero")]
    journal: usize,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl LastCommit {
    /// From the answer to a transaction whose operation number `at` reads the key.
    pub(super) fn of_txn(done: &TxnResponse, at: usize) -> Self {
        match done.op_responses().get(at) {
            Some(etcd_client::TxnOpResponse::Get(got)) => Self::of(got.kvs().first()),
            _ => Self::default(),
        }
    }

    fn of(kv: Option<&etcd_client::KeyValue>) -> Self {
        kv.map_or_else(Self::default, |kv| Self {
            revision: kv.mod_revision(),
            note: serde_json::from_slice(kv.value()).unwrap_or_default(),
        })
    }
}

impl Inner {
    pub(super) async fn last_commit(&self, patience: Patience) -> Result<LastCommit, CallError> {
        let key = self.keys.commit.clone();
        let got = self.members.call(patience, |client| {
            let key = key.clone();
            async move { client.kv_client().get(key, None).await }
        });
        Ok(LastCommit::of(got.await?.kvs().first()))
    }

    pub(super) async fn commit(&self, epoch: Epoch, writes: Vec<Write>) -> Result<(), StoreError> {
        let term = self.term(epoch).ok_or(StoreError::Deposed { epoch })?;
        let writes = last_of_each(writes);
        tokio::select! {
            biased;
            done = self.commit_in(&term, writes) => done,
            () = term.ended.cancelled() => Err(StoreError::Deposed { epoch }),
        }
    }

    async fn commit_in(&self, term: &Term, writes: Vec<Write>) -> Result<(), StoreError> {
        let mut last = term.last.lock().await;
        let mut rest = VecDeque::from(writes);
        let first = one_transaction(&mut rest);
        if rest.is_empty() {
            let ops = first.into_iter().map(|write| self.op(write)).collect();
            return self.guarded(term, &mut last, ops, 0).await;
        }
        let writes: Vec<Write> = first.into_iter().chain(rest).collect();
        self.journal(term, &mut last, &writes).await?;
        self.apply(term, &mut last, writes).await
    }

    /// Commits to the journal what one transaction can't hold. After this it counts.
    pub(super) async fn journal(
        &self,
        term: &Term,
        last: &mut LastCommit,
        writes: &[Write],
    ) -> Result<(), StoreError> {
        let pieces = pieces(writes);
        let journal = self.keys.journal();
        let mut number = 0;
        for group in pieces.chunks(MAX_BYTES / PIECE_BYTES) {
            let put = |(at, piece): (usize, &Vec<u8>)| {
                let key = format!("{journal}{:08}", number + at);
                TxnOp::put(key, piece.as_slice(), None)
            };
            let ops = group.iter().enumerate().map(put).collect();
            number += group.len();
            // The last of these transactions says that all pieces are there.
            let complete = if number == pieces.len() { number } else { 0 };
            self.guarded(term, last, ops, complete).await?;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) async fn journal_is_empty(&self) -> bool {
        let last = self.last_commit(Patience::Endless).await;
        last.is_ok_and(|last| last.note.journal == 0)
    }

    /// Applies what the journal holds, in order, and empties the journal.
    async fn apply(
        &self,
        term: &Term,
        last: &mut LastCommit,
        writes: Vec<Write>,
    ) -> Result<(), StoreError> {
        let pieces = last.note.journal;
        let mut rest = VecDeque::from(writes);
        while !rest.is_empty() {
            let some = one_transaction(&mut rest);
            let ops = some.into_iter().map(|write| self.op(write)).collect();
            self.guarded(term, last, ops, pieces).await?;
        }
        let journal = self.keys.journal();
        let clear = DeleteOptions::new().with_range(end_of(journal.as_bytes()));
        let ops = vec![TxnOp::delete(journal, Some(clear))];
        self.guarded(term, last, ops, 0).await
    }

    /// Finishes what an earlier leader has committed to the journal; forgets what it has not.
    pub(super) async fn recover(&self, term: &Term) -> Result<(), StoreError> {
        let mut last = term.last.lock().await;
        let failed = |e: CallError| e.into_store("read the journal");
        let journal = self.keys.journal();
        let got = self
            .members
            .call(Patience::Endless, |client| {
                let (from, options) = (journal.clone(), GetOptions::new().with_prefix());
                async move {
                    let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
                    kv.get(from, Some(options)).await
                }
            })
            .await
            .map_err(failed)?;
        if got.kvs().is_empty() && last.note.journal == 0 {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for kv in got.kvs().iter().take(last.note.journal) {
            bytes.extend_from_slice(kv.value());
        }
        let entries: Vec<Entry> = if last.note.journal == 0 {
            Vec::new()
        } else {
            serde_json::from_slice(&bytes).map_err(|e| StoreError::Corrupted {
                path: journal.clone(),
                what: format!("its pieces make no commit: {e}"),
            })?
        };
        let writes = entries.into_iter().map(Write::from).collect();
        self.apply(term, &mut last, writes).await
    }

    /// One transaction under both guards. Sent again until it is known to be done, or the term is over.
    async fn guarded(
        &self,
        term: &Term,
        last: &mut LastCommit,
        mut ops: Vec<TxnOp>,
        journal: usize,
    ) -> Result<(), StoreError> {
        let deposed = || StoreError::Deposed { epoch: term.epoch };
        if !term.holds() {
            term.ended.cancel();
            return Err(deposed());
        }
        let same_term = last.note.epoch == term.epoch.0;
        let note = Note {
            epoch: term.epoch.0,
            number: if same_term { last.note.number + 1 } else { 1 },
            journal,
        };
        let (leader, commit) = (self.keys.leader.as_str(), self.keys.commit.as_str());
        let value = serde_json::to_vec(&note).unwrap_or_default();
        ops.push(TxnOp::put(commit, value, None));
        let txn = Txn::new()
            .when([
                Compare::create_revision(leader, CompareOp::Equal, revision_of(term.epoch)),
                Compare::mod_revision(commit, CompareOp::Equal, last.revision),
            ])
            .and_then(ops)
            .or_else([TxnOp::get(leader, None), TxnOp::get(commit, None)]);
        let done = self.members.call(Patience::Endless, |client| {
            let txn = txn.clone();
            async move { client.kv_client().txn(txn).await }
        });
        let done = done.await.map_err(|e| e.into_store("commit"))?;
        if done.succeeded() {
            self.members.wrote();
            *last = LastCommit {
                revision: done
                    .header()
                    .map_or(0, etcd_client::ResponseHeader::revision),
                note,
            };
            return Ok(());
        }
        let leads = match done.op_responses().first() {
            Some(etcd_client::TxnOpResponse::Get(got)) => {
                got.kvs().first().map(|kv| kv.create_revision())
            }
            _ => None,
        };
        if leads != Some(revision_of(term.epoch)) {
            term.ended.cancel();
            return Err(deposed());
        }
        let stands = LastCommit::of_txn(&done, 1);
        if stands.note == note {
            // It was done before: only its answer was lost.
            *last = stands;
            return Ok(());
        }
        term.ended.cancel();
        Err(StoreError::Corrupted {
            path: commit.to_owned(),
            what: format!(
                "it says {:?}, which this term did not write: is something else writing below the prefix?",
                stands.note
            ),
        })
    }

    fn op(&self, write: Write) -> TxnOp {
        match write {
            Write::Put { key, value } => TxnOp::put(self.keys.record(&key), value, None),
            Write::Delete { key } => TxnOp::delete(self.keys.record(&key), None),
            Write::DeletePrefix { prefix } => {
                let prefix = self.keys.record(&prefix);
                let all = DeleteOptions::new().with_range(end_of(prefix.as_bytes()));
                TxnOp::delete(prefix, Some(all))
            }
        }
    }

    pub(super) async fn claim(&self, epoch: Epoch, artifacts: &str) -> Result<(), StoreError> {
        let failed = |e: CallError| e.into_store("read whose prefix this is");
        let key = self.keys.cluster.clone();
        let got = self
            .members
            .call(Patience::Endless, |client| {
                let key = key.clone();
                async move { client.kv_client().get(key, None).await }
            })
            .await
            .map_err(failed)?;
        if let Some(kv) = got.kvs().first() {
            let theirs: ClusterNote = serde_json::from_slice(kv.value()).unwrap_or_default();
            if theirs.artifacts == artifacts {
                return Ok(());
            }
            return Err(StoreError::OtherCluster {
                prefix: self.keys.prefix.clone(),
                theirs: theirs.artifacts,
                ours: artifacts.to_owned(),
            });
        }
        let term = self.term(epoch).ok_or(StoreError::Deposed { epoch })?;
        let mut last = term.last.lock().await;
        let note = ClusterNote {
            artifacts: artifacts.to_owned(),
        };
        let value = serde_json::to_vec(&note).unwrap_or_default();
        let ops = vec![TxnOp::put(key, value, None)];
        self.guarded(&term, &mut last, ops, 0).await
    }
}

/// The value of `cluster`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct ClusterNote {
    /// Where this cluster keeps its artifacts.
    artifacts: String,
}

/// etcd takes no key twice in one transaction: only the last write of each key is kept, and none that
/// a later removal of its prefix undoes.
fn last_of_each(writes: Vec<Write>) -> Vec<Write> {
    let mut seen = HashSet::with_capacity(writes.len());
    let mut prefixes: Vec<String> = Vec::new();
    let mut last: Vec<Write> = Vec::with_capacity(writes.len());
    for write in writes.into_iter().rev() {
        let keep = match &write {
            Write::Put { key, .. } | Write::Delete { key } => {
                !prefixes.iter().any(|p| key.starts_with(p.as_str())) && seen.insert(key.clone())
            }
            Write::DeletePrefix { prefix } => {
                let new = !prefixes.iter().any(|p| prefix.starts_with(p.as_str()));
                if new {
                    prefixes.push(prefix.clone());
                }
                new
            }
        };
        if keep {
            last.push(write);
        }
    }
    last.reverse();
    last
}

/// Takes as many writes as one transaction may hold: no more than it takes, and no key that an earlier
/// one of them removes with its prefix.
fn one_transaction(rest: &mut VecDeque<Write>) -> Vec<Write> {
    let mut some: Vec<Write> = Vec::new();
    let mut bytes = 0;
    let mut prefixes: Vec<String> = Vec::new();
    while let Some(next) = rest.front() {
        let full = some.len() + 1 >= MAX_OPS || bytes + size(next) > MAX_BYTES;
        let (Write::Put { key, .. } | Write::Delete { key } | Write::DeletePrefix { prefix: key }) =
            next;
        let undone = prefixes.iter().any(|p| key.starts_with(p.as_str()));
        if !some.is_empty() && (full || undone) {
            break;
        }
        bytes += size(next);
        if let Write::DeletePrefix { prefix } = next {
            prefixes.push(prefix.clone());
        }
        some.extend(rest.pop_front());
    }
    some
}

fn size(write: &Write) -> usize {
    match write {
        Write::Put { key, value } => key.len() + value.len(),
        Write::Delete { key } | Write::DeletePrefix { prefix: key } => key.len(),
    }
}

/// One write in the journal.
#[derive(Serialize, Deserialize)]
enum Entry {
    Put(String, String),
    Delete(String),
    DeletePrefix(String),
}

impl From<&Write> for Entry {
    fn from(write: &Write) -> Self {
        match write {
            // Values are JSON, so they are text.
            Write::Put { key, value } => {
                Self::Put(key.clone(), String::from_utf8_lossy(value).into_owned())
            }
            Write::Delete { key } => Self::Delete(key.clone()),
            Write::DeletePrefix { prefix } => Self::DeletePrefix(prefix.clone()),
        }
    }
}

impl From<Entry> for Write {
    fn from(entry: Entry) -> Self {
        match entry {
            Entry::Put(key, value) => Self::Put {
                key,
                value: value.into_bytes(),
            },
            Entry::Delete(key) => Self::Delete { key },
            Entry::DeletePrefix(prefix) => Self::DeletePrefix { prefix },
        }
    }
}

/// A commit as pieces of the journal.
fn pieces(writes: &[Write]) -> Vec<Vec<u8>> {
    let entries: Vec<Entry> = writes.iter().map(Entry::from).collect();
    let bytes = serde_json::to_vec(&entries).unwrap_or_default();
    bytes.chunks(PIECE_BYTES).map(<[u8]>::to_vec).collect()
}
