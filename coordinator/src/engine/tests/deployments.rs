//! What becomes live where, and how a deployment comes to be a failed one.

use emberline_common::{
    delivery::{Change, ChangeKind, Commit, DeploymentKind, DeploymentOutcome, FailureCause},
    ids::DeploymentId,
    run_view::ModelRegistration,
};

use super::*;
use crate::engine::api::{Merge, OutsideEvent};

/// Trains and deploys a model of that content; the run's deployment is the last one then.
pub(super) fn deploy(cluster: &mut Cluster, content: &str) -> RunId {
    let environment = json!({"model": "m", "alias": "champion"});
    deploy_to(cluster, content, environment)
}

pub(super) fn deploy_to(cluster: &mut Cluster, content: &str, with: Value) -> RunId {
    deploy_as(cluster, content, with, Value::Null)
}

pub(super) fn deploy_as(cluster: &mut Cluster, content: &str, with: Value, schema: Value) -> RunId {
    let run = cluster.submit(json!({"pipeline": "p", "stages": {
        "train": {"kind": "train", "cache": false},
        "deploy": {"kind": "deploy", "inputs": {"model": "train.data"}, "with": with},
    }}));
    let train = cluster.took().remove(0);
    cluster.succeed(&train, content);
    let attempt = cluster.took().remove(0);
    let registration = ModelRegistration {
        model: "m".parse().unwrap(),
        alias: Some("champion".parse().unwrap()),
        artifact: attempt.1.inputs[0].artifact.clone(),
        metrics: Map::new(),
        schema,
        notes: String::new(),
    };
    cluster.report(
        &attempt,
        Ok(AttemptSuccess {
            registration: Some(registration),
            ..AttemptSuccess::default()
        }),
    );
    cluster.credits(attempt.0, 1);
    run
}

pub(super) fn last(cluster: &Cluster) -> emberline_common::delivery::Deployment {
    cluster
        .engine
        .deployments()
        .next_back()
        .unwrap()
        .as_ref()
        .clone()
}

pub(super) fn live(cluster: &Cluster, environment: &str) -> u32 {
    let mut all = cluster.engine.environments();
    all.find(|(e, ..)| e.as_str() == environment)
        .map_or(0, |(.., live)| live.version)
}

pub(super) fn champion(cluster: &Cluster) -> u32 {
    let (view, _) = cluster.engine.model(&"m".parse().unwrap()).unwrap();
    view.aliases.values().copied().next().unwrap()
}

pub(super) fn ask(cluster: &mut Cluster, command: Command) -> Result<Answer, Refusal> {
    cluster.now = cluster.now.after(Duration::from_secs(60));
    cluster.try_handle(command)
}

pub(super) fn roll_back(cluster: &mut Cluster) -> Result<Answer, Refusal> {
    ask(
        cluster,
        Command::RollBack {
            environment: "production".parse().unwrap(),
            model: None,
            expected: None,
            why: "it is wrong".into(),
        },
    )
}

#[test]
fn a_deploy_stage_makes_its_version_live() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    let run = deploy(&mut cluster, "a");
    let made = last(&cluster);
    assert_eq!((made.id, made.version), (DeploymentId(1), 1));
    assert_eq!(made.environment.as_str(), "production");
    assert_eq!((made.run, made.outcome), (run, DeploymentOutcome::Live));
    assert!(made.accepted_at <= made.started_at);
    assert!(Some(made.started_at) <= made.finished_at);
    assert_eq!(live(&cluster, "production"), 1);
}

#[test]
fn what_is_live_already_is_not_deployed_again_and_what_was_before_is() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    for content in ["a", "a", "b", "a"] {
        deploy(&mut cluster, content);
    }
    let versions: Vec<u32> = cluster.engine.deployments().map(|d| d.version).collect();
    assert_eq!(versions, [1, 2, 1]);
    let previous = cluster.engine.deployments().map(|d| d.previous);
    let expected = [None, Some(DeploymentId(1)), Some(DeploymentId(2))];
    assert!(previous.eq(expected));
}

#[test]
fn environments_are_apart() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    let staging = json!({"model": "m", "environment": "staging"});
    deploy_to(&mut cluster, "a", staging.clone());
    deploy_to(&mut cluster, "b", staging);
    deploy(&mut cluster, "a");
    assert_eq!(
        (live(&cluster, "staging"), live(&cluster, "production")),
        (2, 1)
    );
}

#[test]
fn a_deploy_stage_that_fails_is_caught_before_exposure() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.submit(single(
        "p",
        json!({"kind": "deploy", "with": {"model": "m"}}),
    ));
    let attempt = cluster.took().remove(0);
    cluster.fail(&attempt, Reason::Data);
    let made = last(&cluster);
    assert_eq!(made.outcome, DeploymentOutcome::CaughtBeforeExposure);
    assert_eq!((made.version, live(&cluster, "production")), (0, 0));
    let marked = ask(
        &mut cluster,
        Command::MarkFailed {
            deployment: made.id,
            began_at: None,
            why: String::new(),
        },
    );
    assert!(matches!(marked, Err(Refusal::WrongDeployment(_))));
}

#[test]
fn a_rollback_makes_the_last_good_version_live_and_marks_the_bad_one() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    for content in ["a", "b", "c"] {
        deploy(&mut cluster, content);
    }
    assert_eq!(champion(&cluster), 3);
    for (live_now, bad) in [(2, 3), (1, 2)] {
        let answer = roll_back(&mut cluster).unwrap();
        let Answer::Deployment { deployment, failed } = answer else {
            panic!("another answer: {answer:?}");
        };
        let failed = failed.unwrap();
        assert_eq!((deployment.version, failed.version), (live_now, bad));
        assert_eq!(deployment.kind, DeploymentKind::Rollback);
        assert_eq!(deployment.repairs, Some(failed.id));
        assert_eq!(
            failed.failure.as_ref().unwrap().cause,
            FailureCause::Rollback
        );
        assert_eq!(live(&cluster, "production"), live_now);
        assert_eq!(champion(&cluster), live_now);
    }
    // Both later versions were gone back from: neither is a way out.
    assert!(matches!(
        roll_back(&mut cluster),
        Err(Refusal::WrongDeployment(_))
    ));
}

#[test]
fn a_rollback_prefers_what_nobody_called_bad_but_takes_what_there_is() {
    for (marked, back) in [(&[2][..], 1), (&[1, 2], 2)] {
        let mut cluster = Cluster::new();
        cluster.worker(1, 8, 8);
        for content in ["a", "b", "c"] {
            deploy(&mut cluster, content);
        }
        for id in marked {
            let mark = Command::MarkFailed {
                deployment: DeploymentId(*id),
                began_at: None,
                why: String::new(),
            };
            ask(&mut cluster, mark).unwrap();
        }
        roll_back(&mut cluster).unwrap();
        assert_eq!(live(&cluster, "production"), back);
    }
}

#[test]
fn a_rollback_of_something_else_than_expected_is_refused() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    deploy(&mut cluster, "b");
    let refused = ask(
        &mut cluster,
        Command::RollBack {
            environment: "production".parse().unwrap(),
            model: None,
            expected: Some(DeploymentId(1)),
            why: String::new(),
        },
    );
    assert!(matches!(refused, Err(Refusal::WrongDeployment(_))));
    assert_eq!(live(&cluster, "production"), 2);
}

#[test]
fn a_failure_is_noted_once_and_never_before_the_version_was_live() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    let live_at = last(&cluster).finished_at.unwrap();
    let mark = |why: &str| Command::MarkFailed {
        deployment: DeploymentId(1),
        began_at: Some(Timestamp(1)),
        why: why.into(),
    };
    ask(&mut cluster, mark("first")).unwrap();
    ask(&mut cluster, mark("second")).unwrap();
    let failure = last(&cluster).failure.unwrap();
    assert_eq!((failure.began_at, failure.why.as_str()), (live_at, "first"));
}

#[test]
fn an_incident_is_about_what_was_live_when_it_began() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    let between = cluster.now.after(Duration::from_secs(1));
    cluster.now = cluster.now.after(Duration::from_secs(10));
    deploy(&mut cluster, "b");
    let detected = OutsideEvent::IncidentDetected {
        incident: "i-1".into(),
        environment: "production".parse().unwrap(),
        model: None,
        detected_at: between,
        why: "errors".into(),
    };
    let new = ask(&mut cluster, Command::Outside(detected.clone())).unwrap();
    assert!(matches!(new, Answer::Noted { changed: true }));
    let again = ask(&mut cluster, Command::Outside(detected)).unwrap();
    assert!(matches!(again, Answer::Noted { changed: false }));
    let first = cluster.engine.deployment(DeploymentId(1)).unwrap().clone();
    assert_eq!(first.failure.as_ref().unwrap().began_at, between);
    assert_eq!(last(&cluster).failure, None);
    let resolved = OutsideEvent::IncidentResolved {
        incident: "i-1".into(),
        resolved_at: Timestamp(1),
    };
    ask(&mut cluster, Command::Outside(resolved)).unwrap();
    let first = cluster.engine.deployment(DeploymentId(1)).unwrap();
    let failure = first.failure.as_ref().unwrap();
    assert_eq!(failure.resolved_at, Some(between), "never before it began");
}

#[test]
fn a_merge_is_noted_whether_it_is_told_before_or_after_the_deployment() {
    for early in [true, false] {
        let mut cluster = Cluster::new();
        cluster.worker(1, 8, 8);
        let commit = |revision: &str| Commit {
            revision: revision.into(),
            committed_at: Timestamp(1),
            pushed_at: None,
        };
        cluster.change = Some(Change {
            kind: ChangeKind::Code,
            repository: "https://example.org/a".into(),
            branch: "main".into(),
            revision: "b".into(),
            id: String::new(),
            committed_at: Timestamp(1),
            authored_at: None,
            pushed_at: None,
            dirty: false,
            commits: vec![commit("b"), commit("a")],
            left_out: 0,
        });
        let merge = Command::Outside(OutsideEvent::ChangeMerged(Merge {
            repository: String::new(),
            revision: "a".into(),
            merged_at: Timestamp(5),
        }));
        if early {
            ask(&mut cluster, merge.clone()).unwrap();
        }
        deploy(&mut cluster, "a");
        if !early {
            ask(&mut cluster, merge).unwrap();
        }
        let change = last(&cluster).change.unwrap();
        assert_eq!(change.commits[1].pushed_at, Some(Timestamp(5)));
        assert_eq!(change.pushed_at, None);
    }
}

#[test]
fn the_next_leader_knows_every_deployment() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    deploy(&mut cluster, "b");
    roll_back(&mut cluster).unwrap();
    let next = cluster.next_leader();
    let before: Vec<_> = cluster.engine.deployments().collect();
    let after: Vec<_> = next.deployments().collect();
    assert_eq!(before, after);
    assert_eq!(before.len(), 3);
    assert!(cluster.engine.environments().eq(next.environments()));
}

#[test]
fn what_outside_systems_have_to_be_told_of_is_kept_until_they_were() {
    let mut cluster = Cluster::new();
    cluster.engine.config.keep_untold = true;
    cluster.worker(1, 8, 8);
    let run = deploy(&mut cluster, "a");
    cluster.handle(Command::RunArchived {
        run: run.clone(),
        archive: Digest::of(b"archive"),
    });
    let next = cluster.next_leader();
    let untold: Vec<_> = next.untold(0).collect();
    assert_eq!(untold, [(1, "d1"), (2, run.as_str())]);
    cluster.handle(Command::Told { up_to: 1 });
    let left: Vec<_> = cluster.engine.untold(0).collect();
    assert_eq!(left, [(2, run.as_str())]);
    assert_eq!(cluster.next_leader().untold(0).count(), 1);
    cluster.handle(Command::Told { up_to: 2 });
    assert_eq!(cluster.next_leader().untold(0).count(), 0);
}
