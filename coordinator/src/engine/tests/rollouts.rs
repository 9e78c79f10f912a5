//! How a version is tried, and what becomes of it.

use emberline_common::{
    delivery::{DeploymentOutcome, FailureCause, RolloutPhase},
    ids::DeploymentId,
    serving::{Traffic, VersionStats},
};

use super::{
    deployments::{ask, champion, deploy, deploy_as, deploy_to, last, live, roll_back},
    *,
};

/// 10 % for a minute, 50 % for two; a hundredth of the requests may fail, and 10 count.
fn canary() -> Value {
    json!({"model": "m", "alias": "champion", "strategy": {
        "type": "canary",
        "steps": [{"weight": 10, "for": "1m"}, {"weight": 50, "for": "2m"}],
        "min_requests": 10,
        "conditions": {"max_error_rate": 0.1},
    }})
}

fn with(with: Value, field: &str, value: Value) -> Value {
    let mut with = with;
    with["strategy"][field] = value;
    with
}

fn requests(requests: u64, errors: u64) -> VersionStats {
    VersionStats {
        requests,
        errors,
        ..VersionStats::default()
    }
}

/// Version 1 is live on worker 1, and version 2 begins its canary.
fn begun(with: Value) -> (Cluster, SessionId) {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let one = cluster.serving_worker(1);
    deploy(&mut cluster, "a");
    cluster.obey_all();
    deploy_to(&mut cluster, "b", with);
    cluster.obey_all();
    (cluster, one)
}

fn phase(cluster: &Cluster) -> RolloutPhase {
    last(cluster).rollout.unwrap().phase
}

fn wait(cluster: &mut Cluster, seconds: u64) {
    cluster.now = cluster.now.after(Duration::from_secs(seconds));
    cluster.handle(Command::Tick);
}

#[test]
fn a_canary_gets_its_shares_one_after_the_other_and_then_is_live() {
    let (mut cluster, one) = begun(canary());
    let of = |share| vec![(1, Traffic::Live), (2, Traffic::Canary { share })];
    assert_eq!(cluster.serves(one), of(1000));
    assert_eq!(champion(&cluster), 1, "the alias moves when it is live");
    cluster.obey(one, |_| requests(9, 0));
    wait(&mut cluster, 61);
    assert_eq!(cluster.serves(one), of(1000), "too few have been answered");
    cluster.obey(one, |_| requests(10, 0));
    assert_eq!(cluster.serves(one), of(5000));
    cluster.obey(one, |_| requests(20, 0));
    wait(&mut cluster, 119);
    assert_eq!(cluster.serves(one), of(5000));
    wait(&mut cluster, 2);
    assert_eq!((live(&cluster, "production"), champion(&cluster)), (2, 2));
    let made = last(&cluster);
    assert_eq!(made.outcome, DeploymentOutcome::Live);
    assert!(made.failure.is_none() && made.rollout.unwrap().exposed_at.is_some());
    assert_eq!(cluster.serves(one)[0], (2, Traffic::Live));
}

#[test]
fn a_canary_that_fails_is_given_up_at_once_and_counts_as_failed() {
    let (mut cluster, one) = begun(canary());
    cluster.obey(one, |version| requests(3, if version == 2 { 2 } else { 0 }));
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)]);
    let made = last(&cluster);
    assert_eq!(made.outcome, DeploymentOutcome::Aborted);
    let failure = made.failure.unwrap();
    assert_eq!(failure.cause, FailureCause::CanaryAborted);
    assert_eq!(Some(failure.began_at), made.rollout.unwrap().exposed_at);
    assert!(failure.why.contains("max_error_rate"), "{}", failure.why);
    assert_eq!((live(&cluster, "production"), champion(&cluster)), (1, 1));
}

#[test]
fn a_canary_that_answered_nobody_is_caught_before_exposure() {
    let (mut cluster, one) = begun(canary());
    // The minute of the step, and ten to wait for requests.
    wait(&mut cluster, 60);
    wait(&mut cluster, 601);
    let made = last(&cluster);
    assert_eq!(made.outcome, DeploymentOutcome::CaughtBeforeExposure);
    assert!(made.failure.is_none());
    assert!(made.rollout.unwrap().note.contains("0 of 10 requests"));
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)]);
}

#[test]
fn the_next_leader_goes_on_with_the_step() {
    let (mut cluster, one) = begun(canary());
    cluster.obey(one, |_| requests(10, 0));
    wait(&mut cluster, 61);
    assert_eq!(phase(&cluster), RolloutPhase::Step { step: 1 });
    let has = super::serving::obeyed(&cluster.plans[&one], |_| requests(10, 0));
    cluster.fail_over();
    let one = cluster.serving_again(11, 1, has);
    let of = |share| vec![(1, Traffic::Live), (2, Traffic::Canary { share })];
    assert_eq!(cluster.serves(one), of(5000));
    wait(&mut cluster, 119);
    assert_eq!(
        live(&cluster, "production"),
        1,
        "its two minutes are not over"
    );
    cluster.obey(one, |_| requests(30, 0));
    wait(&mut cluster, 2);
    assert_eq!(live(&cluster, "production"), 2);
}

#[test]
fn a_worker_that_comes_back_is_not_counted_twice() {
    let (mut cluster, one) = begun(canary());
    cluster.obey(one, |_| requests(8, 0));
    let has = super::serving::obeyed(&cluster.plans[&one], |_| requests(9, 0));
    let again = cluster.serving_again(11, 1, has);
    cluster.obey(again, |_| requests(9, 0));
    let (new, old) = cluster.engine.window(&last(&cluster)).unwrap();
    assert_eq!((new.requests, old.requests), (9, 9));
}

#[test]
fn a_person_has_to_say_yes_where_that_is_asked_for() {
    let asks = with(canary(), "approval", json!(true));
    let (mut cluster, one) = begun(asks.clone());
    for (seconds, count) in [(61, 10), (121, 30)] {
        cluster.obey(one, |_| requests(count, 0));
        wait(&mut cluster, seconds);
    }
    assert_eq!(phase(&cluster), RolloutPhase::AwaitingApproval);
    assert_eq!(cluster.serves(one)[1], (2, Traffic::Canary { share: 5000 }));
    wait(&mut cluster, 100_000);
    assert_eq!(phase(&cluster), RolloutPhase::AwaitingApproval);
    let approve = |id| Command::Approve {
        deployment: DeploymentId(id),
    };
    ask(&mut cluster, approve(2)).unwrap();
    assert_eq!(live(&cluster, "production"), 2);
    ask(&mut cluster, approve(2)).unwrap();
    assert!(matches!(
        ask(&mut cluster, approve(1)),
        Err(Refusal::WrongDeployment(_))
    ));
    assert!(matches!(
        ask(&mut cluster, approve(7)),
        Err(Refusal::NoSuchDeployment(_))
    ));

    // Said before, it is not asked for.
    let (mut cluster, one) = begun(asks);
    ask(&mut cluster, approve(2)).unwrap();
    for (seconds, count) in [(61, 10), (121, 30)] {
        cluster.obey(one, |_| requests(count, 0));
        wait(&mut cluster, seconds);
    }
    assert_eq!(live(&cluster, "production"), 2);
}

#[test]
fn a_shadow_answers_nobody_and_failing_in_it_is_no_failed_deployment() {
    let shadow = json!({"model": "m", "strategy": {
        "type": "shadow", "weight": 50, "for": "1m", "min_requests": 10,
        "conditions": {"max_error_rate": 0.1},
    }});
    let (mut cluster, one) = begun(shadow.clone());
    assert_eq!(cluster.serves(one)[1], (2, Traffic::Shadow { share: 5000 }));
    cluster.obey(one, |_| requests(10, 2));
    assert_eq!(
        last(&cluster).outcome,
        DeploymentOutcome::CaughtBeforeExposure
    );

    let (mut cluster, one) = begun(shadow);
    cluster.obey(one, |_| requests(10, 0));
    wait(&mut cluster, 61);
    assert_eq!(live(&cluster, "production"), 2);
}

#[test]
fn a_rollback_in_the_middle_of_a_canary_gives_up_the_canary() {
    let (mut cluster, one) = begun(canary());
    cluster.obey(one, |_| requests(3, 0));
    let Answer::Deployment { deployment, failed } = roll_back(&mut cluster).unwrap() else {
        panic!("another answer");
    };
    assert_eq!(deployment.version, 1);
    let failed = failed.unwrap();
    assert_eq!(failed.outcome, DeploymentOutcome::Aborted);
    assert_eq!(
        failed.failure.as_ref().unwrap().cause,
        FailureCause::Rollback
    );
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)]);
}

#[test]
fn a_newer_deployment_takes_the_place_of_one_under_way() {
    let (mut cluster, one) = begun(canary());
    cluster.obey(one, |_| requests(3, 0));
    deploy_to(&mut cluster, "c", canary());
    let outcome = |id| cluster.engine.deployment(DeploymentId(id)).unwrap().outcome;
    assert_eq!(outcome(2), DeploymentOutcome::Superseded);
    assert_eq!(outcome(3), DeploymentOutcome::InProgress);
    assert_eq!(
        cluster.serves(one),
        [(1, Traffic::Live), (3, Traffic::Standby)]
    );
}

#[test]
fn what_is_watched_after_it_is_live_is_taken_back_by_itself() {
    let watched = json!({"model": "m", "alias": "champion", "strategy": {
        "type": "all_at_once", "watch_for": "10m", "min_requests": 10,
        "conditions": {"max_error_rate": 0.1},
    }});
    let (mut cluster, one) = begun(watched.clone());
    assert_eq!(
        (live(&cluster, "production"), phase(&cluster)),
        (2, RolloutPhase::Watching)
    );
    cluster.obey(one, |version| {
        requests(20, if version == 2 { 5 } else { 0 })
    });
    assert_eq!((live(&cluster, "production"), champion(&cluster)), (1, 1));
    let bad = cluster.engine.deployment(DeploymentId(2)).unwrap();
    assert_eq!(
        bad.failure.as_ref().unwrap().cause,
        FailureCause::GateBreach
    );
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)]);

    let (mut cluster, one) = begun(watched);
    cluster.obey(one, |_| requests(20, 0));
    wait(&mut cluster, 601);
    assert_eq!(
        (live(&cluster, "production"), phase(&cluster)),
        (2, RolloutPhase::Settled)
    );
    cluster.obey(one, |_| requests(40, 20));
    assert_eq!(live(&cluster, "production"), 2, "nobody watches any more");
}

#[test]
fn a_canary_waits_for_a_worker_to_try_it_on() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    deploy(&mut cluster, "a");
    deploy_to(&mut cluster, "b", canary());
    assert_eq!(
        (live(&cluster, "production"), phase(&cluster)),
        (1, RolloutPhase::Preparing)
    );
    let one = cluster.serving_worker(1);
    cluster.obey(one, |_| VersionStats::default());
    assert_eq!(phase(&cluster), RolloutPhase::Step { step: 0 });
    deploy_to(&mut cluster, "c", canary());
    cluster.handle(Command::WorkerDisconnected {
        session: one,
        how: crate::engine::api::Disconnect::Closed,
    });
    wait(&mut cluster, 1);
    wait(&mut cluster, 600);
    assert_eq!(
        last(&cluster).outcome,
        DeploymentOutcome::CaughtBeforeExposure
    );
}

#[test]
fn a_version_that_clients_could_not_talk_to_is_refused() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let column = |name: &str| json!([{"name": name, "type": "float"}]);
    let plain = json!({"model": "m"});
    deploy_as(&mut cluster, "a", plain.clone(), column("x"));
    let run = deploy_as(&mut cluster, "b", plain, column("y"));
    assert_eq!(cluster.task(&run, "deploy"), TaskState::Failed);
    let failure = cluster.view(&run).summary.failure.unwrap();
    assert_eq!(failure.reason, Reason::UserError);
    assert!(failure.message.contains("`x`"), "{}", failure.message);
    assert_eq!(
        last(&cluster).outcome,
        DeploymentOutcome::CaughtBeforeExposure
    );
    assert_eq!(live(&cluster, "production"), 1);
    let allowed = json!({"model": "m", "allow_schema_change": true});
    deploy_as(&mut cluster, "b", allowed, column("y"));
    assert_eq!(live(&cluster, "production"), 2);
}
