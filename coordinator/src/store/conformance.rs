//! What every [`StateStore`] must do, as functions that any implementation's tests can run.
//!
//! A failed expectation panics with what was expected, as tests do; nothing here is called by the
//! product itself.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "these are tests"
)]

use std::{sync::Arc, time::Duration};

use emberline_common::ids::Epoch;
use futures::future::BoxFuture;

use super::{Candidate, Record, SCHEMA_KEY, SCHEMA_VERSION, StateStore, StoreError, check_schema};
use crate::engine::api::Write;

/// How the tests come to a store of the kind under test.
pub trait Harness: Send + Sync {
    /// Opens the one state of this harness; called again after the handles before were dropped
    /// without a farewell, as after a `kill -9`.
    fn open(&self) -> BoxFuture<'_, Arc<dyn StateStore>>;

    /// Makes another coordinator the leader behind the back of the one that leads.
    fn depose<'a>(&'a self, store: &'a dyn StateStore) -> BoxFuture<'a, ()>;
}

/// One test.
pub type Test = for<'a> fn(&'a dyn Harness) -> BoxFuture<'a, ()>;

/// Every test with its name. Each wants a fresh harness.
#[must_use]
pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("records_come_back_in_the_order_of_their_keys", |h| {
            Box::pin(records_come_back_in_the_order_of_their_keys(h))
        }),
        ("a_prefix_is_compared_byte_by_byte", |h| {
            Box::pin(a_prefix_is_compared_byte_by_byte(h))
        }),
        ("the_last_write_of_a_batch_wins", |h| {
            Box::pin(the_last_write_of_a_batch_wins(h))
        }),
        ("a_prefix_is_removed_as_one_write", |h| {
            Box::pin(a_prefix_is_removed_as_one_write(h))
        }),
        ("committed_records_survive_a_crash", |h| {
            Box::pin(committed_records_survive_a_crash(h))
        }),
        ("each_campaign_has_a_higher_epoch", |h| {
            Box::pin(each_campaign_has_a_higher_epoch(h))
        }),
        ("a_deposed_leader_writes_nothing", |h| {
            Box::pin(a_deposed_leader_writes_nothing(h))
        }),
        ("nobody_writes_without_leading", |h| {
            Box::pin(nobody_writes_without_leading(h))
        }),
        ("after_resigning_nobody_leads", |h| {
            Box::pin(after_resigning_nobody_leads(h))
        }),
        ("who_leads_can_be_followed", |h| {
            Box::pin(who_leads_can_be_followed(h))
        }),
        ("a_big_batch_is_one_commit", |h| {
            Box::pin(a_big_batch_is_one_commit(h))
        }),
        ("many_commits_at_once_are_all_there", |h| {
            Box::pin(many_commits_at_once_are_all_there(h))
        }),
        ("a_newer_schema_is_refused", |h| {
            Box::pin(a_newer_schema_is_refused(h))
        }),
    ]
}

/// A candidate of that name.
#[must_use]
pub fn candidate(name: &str) -> Candidate {
    Candidate {
        name: name.to_owned(),
        address: "127.0.0.1:1".to_owned(),
    }
}

fn put(key: &str, value: &str) -> Write {
    Write::Put {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
    }
}

fn delete(key: &str) -> Write {
    Write::Delete {
        key: key.to_owned(),
    }
}

fn record(key: &str, value: &str) -> Record {
    (key.to_owned(), value.as_bytes().to_vec())
}

async fn lead(harness: &dyn Harness) -> (Arc<dyn StateStore>, Epoch) {
    let store = harness.open().await;
    let epoch = store.campaign(candidate("a")).await.unwrap();
    (store, epoch)
}

async fn records_come_back_in_the_order_of_their_keys(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let keys = ["b/2", "b/10", "a/1", "b/1", "c"];
    let writes = keys.iter().map(|k| put(k, k)).collect();
    store.commit(epoch, writes).await.unwrap();
    assert_eq!(
        store.load("b/").await.unwrap(),
        [
            record("b/1", "b/1"),
            record("b/10", "b/10"),
            record("b/2", "b/2")
        ]
    );
    assert_eq!(store.load("").await.unwrap().len(), keys.len());
    assert!(store.load("d").await.unwrap().is_empty());
}

async fn a_prefix_is_compared_byte_by_byte(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let writes = vec![put("runs", "1"), put("runs/a", "2"), put("runs0", "3")];
    store.commit(epoch, writes).await.unwrap();
    assert_eq!(store.load("runs/").await.unwrap(), [record("runs/a", "2")]);
    assert_eq!(store.load("runs").await.unwrap().len(), 3);
}

async fn the_last_write_of_a_batch_wins(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let writes = vec![
        put("k", "1"),
        put("k", "2"),
        delete("gone"),
        put("gone", "1"),
        delete("gone"),
        delete("never"),
    ];
    store.commit(epoch, writes).await.unwrap();
    assert_eq!(store.load("").await.unwrap(), [record("k", "2")]);
}

async fn a_prefix_is_removed_as_one_write(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let keys = ["a/", "a/1", "a/2", "a0", "b/1"];
    let writes = keys.iter().map(|k| put(k, "1")).collect();
    store.commit(epoch, writes).await.unwrap();
    let none = || Write::DeletePrefix {
        prefix: "a/".to_owned(),
    };
    // What stands before it is gone, what comes after it stays.
    let writes = vec![put("a/2", "2"), none(), put("a/3", "3")];
    store.commit(epoch, writes).await.unwrap();
    let left = [record("a/3", "3"), record("a0", "1"), record("b/1", "1")];
    assert_eq!(store.load("").await.unwrap(), left);
    store.commit(epoch, vec![none(), none()]).await.unwrap();
    assert_eq!(store.load("").await.unwrap(), left[1..]);
}

async fn committed_records_survive_a_crash(harness: &dyn Harness) {
    let (store, first) = lead(harness).await;
    store.commit(first, vec![put("k", "1")]).await.unwrap();
    drop(store);
    let store = harness.open().await;
    assert_eq!(store.load("").await.unwrap(), [record("k", "1")]);
    let second = store.campaign(candidate("b")).await.unwrap();
    assert!(second > first, "{second} after {first}");
    store.commit(second, vec![put("k", "2")]).await.unwrap();
    drop(store);
    assert_eq!(
        harness.open().await.load("").await.unwrap(),
        [record("k", "2")]
    );
}

async fn each_campaign_has_a_higher_epoch(harness: &dyn Harness) {
    let (store, first) = lead(harness).await;
    store.resign(first).await.unwrap();
    let second = store.campaign(candidate("a")).await.unwrap();
    assert!(second > first, "{second} after {first}");
    let leader = store.leader().await.unwrap().unwrap();
    assert_eq!((leader.name.as_str(), leader.epoch), ("a", second));
}

async fn a_deposed_leader_writes_nothing(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    store.commit(epoch, vec![put("k", "mine")]).await.unwrap();
    harness.depose(store.as_ref()).await;
    let late = store
        .commit(epoch, vec![put("k", "late"), put("x", "late")])
        .await;
    assert!(
        matches!(&late, Err(StoreError::Deposed { epoch: e }) if *e == epoch),
        "{late:?}"
    );
    assert_eq!(store.load("").await.unwrap(), [record("k", "mine")]);
    // A deposed leader that resigns does not depose its successor.
    let successor = store.leader().await.unwrap();
    store.resign(epoch).await.unwrap();
    assert_eq!(store.leader().await.unwrap(), successor);
}

async fn nobody_writes_without_leading(harness: &dyn Harness) {
    let store = harness.open().await;
    let refused = store.commit(Epoch(0), vec![put("k", "1")]).await;
    assert!(
        matches!(refused, Err(StoreError::Deposed { .. })),
        "{refused:?}"
    );
    assert!(store.load("").await.unwrap().is_empty());
}

async fn after_resigning_nobody_leads(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    store.resign(epoch).await.unwrap();
    assert_eq!(store.leader().await.unwrap(), None);
    let refused = store.commit(epoch, vec![put("k", "1")]).await;
    assert!(
        matches!(refused, Err(StoreError::Deposed { .. })),
        "{refused:?}"
    );
}

async fn who_leads_can_be_followed(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let mut watch = store.watch_leader();
    let seen = |leader: &Option<super::Leader>| leader.as_ref().map(|l| l.epoch);
    let limit = Duration::from_secs(10);
    tokio::time::timeout(limit, watch.wait_for(|l| seen(l) == Some(epoch)))
        .await
        .expect("the leader is seen in time")
        .unwrap();
    store.resign(epoch).await.unwrap();
    tokio::time::timeout(limit, watch.wait_for(Option::is_none))
        .await
        .expect("the resignation is seen in time")
        .unwrap();
}

async fn a_big_batch_is_one_commit(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let value = "x".repeat(1000);
    let writes: Vec<Write> = (0..10_000)
        .map(|i| put(&format!("tasks/r/{i:05}"), &value))
        .collect();
    store.commit(epoch, writes).await.unwrap();
    drop(store);
    let store = harness.open().await;
    let records = store.load("tasks/").await.unwrap();
    assert_eq!(records.len(), 10_000);
    assert!(records.iter().all(|(_, v)| v.len() == 1000));
    let epoch = store.campaign(candidate("b")).await.unwrap();
    let writes = records.iter().map(|(k, _)| delete(k)).collect();
    store.commit(epoch, writes).await.unwrap();
    assert!(store.load("").await.unwrap().is_empty());
}

async fn many_commits_at_once_are_all_there(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    let commits = (0..50).map(|i| store.commit(epoch, vec![put(&format!("k/{i:02}"), "1")]));
    for done in futures::future::join_all(commits).await {
        done.unwrap();
    }
    assert_eq!(store.load("k/").await.unwrap().len(), 50);
}

async fn a_newer_schema_is_refused(harness: &dyn Harness) {
    let (store, epoch) = lead(harness).await;
    check_schema(store.as_ref(), epoch).await.unwrap();
    check_schema(store.as_ref(), epoch).await.unwrap();
    let newer = (SCHEMA_VERSION + 1).to_string();
    store
        .commit(epoch, vec![put(SCHEMA_KEY, &newer)])
        .await
        .unwrap();
    let refused = check_schema(store.as_ref(), epoch).await;
    assert!(
        matches!(refused, Err(StoreError::NewerSchema { .. })),
        "{refused:?}"
    );
}
