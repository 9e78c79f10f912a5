//! Who is a worker, when several processes say that they are.

use super::*;
use crate::engine::api::Disconnect;

#[test]
fn a_second_process_under_the_name_of_a_connected_worker_is_refused() {
    let mut cluster = Cluster::new();
    let first = cluster.register(1, "w", "i1", 4, 1);
    cluster.submit(json!({"pipeline": "p", "stages": {"a": {"kind": "noop"}}}));
    let took = cluster.took();
    let second = cluster.register(2, "w", "i2", 4, 1);
    assert_eq!(cluster.closed, [second]);
    // It has no credits here, and what the first one runs goes on.
    cluster.submit(json!({"pipeline": "q", "stages": {"a": {"kind": "noop"}}}));
    assert!(cluster.took().is_empty());
    cluster.succeed(&took[0], "x");
    assert_eq!(cluster.ended.len(), 1);
    assert_eq!(cluster.took()[0].0, first);
    // When the first one's connection is broken, the name is free.
    cluster.handle(Command::WorkerDisconnected {
        session: first,
        how: Disconnect::Closed,
    });
    let third = cluster.register(3, "w", "i2", 4, 1);
    let took = cluster.took();
    assert_eq!(took.len(), 1);
    assert_eq!(took[0].0, third);
    assert_eq!(cluster.closed, [second]);
}

#[test]
fn a_newer_session_of_the_same_process_closes_the_older_one() {
    let mut cluster = Cluster::new();
    let first = cluster.register(1, "w", "i", 4, 1);
    let second = cluster.register(2, "w", "i", 4, 1);
    assert_eq!(cluster.closed, [first]);
    cluster.submit(json!({"pipeline": "p", "stages": {"a": {"kind": "noop"}}}));
    assert_eq!(cluster.took()[0].0, second);
}
