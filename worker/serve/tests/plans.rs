//! Plans that change while requests come: nobody is dropped, and nobody gets an answer of a version
//! that he was not to get.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use emberline_common::{
    ids::Digest,
    serving::{ServingLimits, ServingPlan, Traffic, VersionState, share_of},
};
use emberline_worker::serving::Serving as _;
use support::*;
use tonic::Code;

fn factory_plan(revision: u64, versions: &[(u32, Digest, Traffic)]) -> ServingPlan {
    let versions = versions
        .iter()
        .map(|(v, artifact, traffic)| served(*v, *artifact, *traffic));
    plan(revision, vec![model("factory", versions.collect())])
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_dropped_while_plans_flip() {
    let served = Served::start().await;
    let (one, two) = (
        served.place.put(&FACTORY).await,
        served.place.put(&FACTORY_2).await,
    );
    served.apply(factory_plan(1, &[(1, one, Traffic::Live)]));
    served.until_ready().await;
    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let mut callers = Vec::new();
    for caller in 0..16 {
        let mut client = served.grpc().await;
        let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
        callers.push(tokio::spawn(async move {
            let mut n = 0;
            let mut seen = [0u64; 3];
            while !stop.load(Relaxed) {
                n += 1;
                let request = factory_request(&format!("{caller}-{n}"), &[machine(n)]);
                let answer = client
                    .model_infer(request)
                    .await
                    .expect("nobody is dropped");
                let version: usize = answer.into_inner().model_version.parse().unwrap();
                seen[version] += 1;
                answered.fetch_add(1, Relaxed);
            }
            seen
        }));
    }
    // Each round loads one anew, moves traffic, and lets go of the other.
    let mut revision = 1;
    for round in 0..12 {
        let plans: [&[(u32, Digest, Traffic)]; 5] = [
            &[
                (1, one, Traffic::Live),
                (2, two, Traffic::Canary { share: 3_000 }),
            ],
            &[
                (1, one, Traffic::Live),
                (2, two, Traffic::Shadow { share: 10_000 }),
            ],
            &[(1, one, Traffic::Standby), (2, two, Traffic::Live)],
            &[(2, two, Traffic::Live)],
            &[(1, one, Traffic::Live)],
        ];
        for next in plans {
            revision += 1;
            served.apply(factory_plan(revision, next));
            // Some wait until all is loaded, and some do not.
            if round % 2 == 0 {
                served.until_ready().await;
            }
            let before = answered.load(Relaxed);
            served
                .until("some more answers", || {
                    (answered.load(Relaxed) > before + 20).then_some(())
                })
                .await;
        }
    }
    stop.store(true, Relaxed);
    let mut seen = [0; 3];
    for caller in callers {
        let own = caller.await.unwrap();
        (0..3).for_each(|v| seen[v] += own[v]);
    }
    assert!(seen[1] > 0 && seen[2] > 0, "{seen:?}");
    served.until_ready().await;
    let status = served.server.status();
    assert_eq!((status.plan, status.versions.len()), (revision, 1));
    assert_eq!(status.versions[0].stats.errors, 0);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_live_stays_until_the_next_is_ready_and_what_is_broken_never_is() {
    let served = Served::start().await;
    let one = served.place.put(&FACTORY).await;
    served.apply(factory_plan(1, &[(1, one, Traffic::Live)]));
    served.until_ready().await;
    let mut client = served.grpc().await;
    let mut broken = FACTORY_2.clone();
    broken.weights.push(0);
    let broken = served.place.put(&broken).await;
    // The plan has version 1 no more; but 2 cannot take over.
    served.apply(factory_plan(2, &[(2, broken, Traffic::Live)]));
    let why = served
        .until("version 2 failed", || {
            match served.version("factory", 2)?.state {
                VersionState::Failed(why) => Some(why),
                _ => None,
            }
        })
        .await;
    assert_eq!(
        why,
        "the model cannot be loaded: `weights.bpk` is not the file that `model.json` was written with"
    );
    let first = served.version("factory", 1).unwrap();
    assert_eq!(
        (first.state, first.traffic),
        (VersionState::Ready, Traffic::Live)
    );
    assert_eq!(
        served.version("factory", 2).unwrap().traffic,
        Traffic::Standby
    );
    let answer = client.model_infer(factory_request("", &[machine(1)])).await;
    assert_eq!(answer.unwrap().into_inner().model_version, "1");
    let mut named = factory_request("", &[machine(1)]);
    named.model_version = "2".to_owned();
    let status = client.model_infer(named).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status
            .message()
            .contains("version 2 of the model `factory` is not ready: it cannot be loaded"),
        "{status:?}"
    );

    // A good one takes over, and then the first is let go of.
    let two = served.place.put(&FACTORY_2).await;
    served.apply(factory_plan(3, &[(3, two, Traffic::Live)]));
    served.until_ready().await;
    let answer = client.model_infer(factory_request("", &[machine(1)])).await;
    assert_eq!(answer.unwrap().into_inner().model_version, "3");
    assert!(served.version("factory", 1).is_none());

    // A plan without the model takes it away.
    served.apply(plan(4, vec![]));
    let status = client
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(served.server.status().versions.is_empty());
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_is_not_ready_leaves_its_share_to_the_live_version() {
    let served = Served::start().await;
    let one = served.place.put(&FACTORY).await;
    // Not in the store at all.
    let nothing = Digest::of(b"nothing");
    let canary = (2, nothing, Traffic::Canary { share: 10_000 });
    served.apply(factory_plan(1, &[(1, one, Traffic::Live), canary]));
    let why = served
        .until("both are settled", || {
            let ready = served.version("factory", 1)?.state == VersionState::Ready;
            match served.version("factory", 2)?.state {
                VersionState::Failed(why) if ready => Some(why),
                _ => None,
            }
        })
        .await;
    assert!(why.contains("is not in the store"), "{why}");
    let mut client = served.grpc().await;
    let answer = client
        .model_infer(factory_request("r", &[machine(1)]))
        .await;
    assert_eq!(answer.unwrap().into_inner().model_version, "1");

    // What changes traffic alone takes effect at once, also while something else cannot be loaded.
    let two = served.place.put(&FACTORY_2).await;
    let both = [
        (1, one, Traffic::Live),
        (2, two, Traffic::Canary { share: 5_000 }),
    ];
    served.apply(factory_plan(2, &both));
    served.until_ready().await;
    for share in [0, 2_500, 10_000] {
        let both = [(1, one, Traffic::Live), (2, two, Traffic::Canary { share })];
        served.apply(factory_plan(3, &both));
        for n in 0..40 {
            let id = format!("x-{n}");
            let answer = client
                .model_infer(factory_request(&id, &[machine(n)]))
                .await;
            let expected = if share_of("factory", &id) < share {
                "2"
            } else {
                "1"
            };
            assert_eq!(answer.unwrap().into_inner().model_version, expected);
        }
    }
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_comes_back_is_tried_again() {
    let served = Served::start().await;
    let one = served.place.put(&FACTORY).await;
    let (here, away) = (
        served.place.path().join("store"),
        served.place.path().join("away"),
    );
    std::fs::rename(&here, &away).unwrap();
    served.apply(factory_plan(1, &[(1, one, Traffic::Live)]));
    served
        .until("it failed", || {
            let state = served.version("factory", 1)?.state;
            matches!(state, VersionState::Failed(_)).then_some(())
        })
        .await;
    assert_eq!(served.get("/v2/health/ready").await.status, 503);
    let _ = std::fs::remove_dir_all(&here);
    std::fs::rename(&away, &here).unwrap();
    served.until_ready().await;
    assert_eq!(served.get("/v2/health/ready").await.status, 200);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_any_more_is_not_counted_as_answered() {
    let served = Served::start().await;
    let limits = ServingLimits {
        max_batch: 1,
        max_queue: 100_000,
        ..limits()
    };
    served.serve_factory(limits).await;
    let machines: Vec<_> = (0..1000).map(machine).collect();
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..64 {
        let mut client = served.grpc().await;
        let request = factory_request(&n.to_string(), &machines);
        callers.spawn(async move { client.model_infer(request).await });
    }
    // The first answers are there, and the others wait; then all callers are gone.
    callers.join_next().await.unwrap().unwrap().unwrap();
    callers.shutdown().await;
    let mut client = served.grpc().await;
    client
        .model_infer(factory_request("last", &[machine(1)]))
        .await
        .unwrap();
    let stats = served.version("factory", 1).unwrap().stats;
    assert!(stats.requests < 65, "all were computed: {}", stats.requests);
    assert_eq!(stats.errors, 0);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_sees_copies_and_answers_nobody() {
    let served = Served::start().await;
    let (one, other) = (
        served.place.put(&FACTORY).await,
        served.place.put(&TRIPLE).await,
    );
    let two = served.place.put(&FACTORY_2).await;
    let shadow = Traffic::Shadow { share: 10_000 };
    served.apply(factory_plan(
        1,
        &[(1, one, Traffic::Live), (2, two, shadow)],
    ));
    served.until_ready().await;
    let mut client = served.grpc().await;
    for n in 0..30 {
        let answer = client
            .model_infer(factory_request("", &[machine(n), machine(n + 1)]))
            .await;
        assert_eq!(answer.unwrap().into_inner().model_version, "1");
    }
    let stats = served
        .until("the shadow has seen all", || {
            let stats = served.version("factory", 2)?.stats;
            (stats.requests + stats.overloaded == 30).then_some(stats)
        })
        .await;
    assert_eq!((stats.errors, stats.rejected), (0, 0));
    assert_eq!(stats.predictions.iter().sum::<u64>(), stats.rows);
    let live = served.version("factory", 1).unwrap().stats;
    assert_eq!((live.requests, live.rows), (30, 60));

    // One that takes other columns harms nobody either.
    served.apply(factory_plan(
        2,
        &[(1, one, Traffic::Live), (3, other, shadow)],
    ));
    served.until_ready().await;
    client
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    let stats = served.version("factory", 3).unwrap().stats;
    assert_eq!((stats.requests, stats.rejected), (0, 1));
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_is_answered_when_it_stops() {
    let served = Arc::new(Served::factory().await);
    let machines: Vec<_> = (0..500).map(machine).collect();
    let mut callers = Vec::new();
    for n in 0..8 {
        let mut client = served.grpc().await;
        let request = factory_request(&format!("r-{n}"), &machines);
        callers.push(tokio::spawn(async move {
            let mut answered = 0;
            loop {
                match client.model_infer(request.clone()).await {
                    Ok(_) => answered += 1,
                    Err(status) => return (answered, status),
                }
            }
        }));
    }
    served
        .until("some answers", || {
            (served.version("factory", 1)?.stats.requests > 20).then_some(())
        })
        .await;
    tokio::time::timeout(Duration::from_secs(20), served.server.stop())
        .await
        .unwrap();
    let mut all = 0;
    for caller in callers {
        let (answered, status) = caller.await.unwrap();
        // The connection had ended, or was about to; clients have several names for that.
        let gone = [
            Code::Unavailable,
            Code::Internal,
            Code::Unknown,
            Code::Cancelled,
        ];
        assert!(gone.contains(&status.code()), "{status:?}");
        all += answered;
    }
    // Whatever was taken had its answer, and that arrived.
    let stats = served.version("factory", 1).unwrap().stats;
    assert_eq!((stats.requests, stats.errors), (all, 0));
}
