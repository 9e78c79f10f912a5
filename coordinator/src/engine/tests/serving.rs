//! Where replicas are put, and what workers are told to serve.

use emberline_common::{
    delivery::DeploymentOutcome,
    ids::DeploymentId,
    serving::{Traffic, VersionState, VersionStats, VersionStatus},
};

use super::{
    deployments::{deploy, deploy_to, last, live, roll_back},
    *,
};

pub(super) fn offer(number: u64) -> ServingOffer {
    ServingOffer {
        address: format!("w{number}:7430"),
        environment: "production".parse().unwrap(),
    }
}

/// What a worker says of itself that has loaded all of its plan, having counted `stats` of a version.
pub(super) fn obeyed(plan: &ServingPlan, stats: impl Fn(u32) -> VersionStats) -> ServingStatus {
    let models = plan.models.iter();
    let versions = models.flat_map(|model| {
        model.versions.iter().map(|version| VersionStatus {
            model: model.model.clone(),
            version: version.version,
            deployment: version.deployment,
            state: VersionState::Ready,
            traffic: version.traffic,
            stats: stats(version.version),
        })
    });
    ServingStatus {
        plan: plan.revision,
        ready: true,
        versions: versions.collect(),
    }
}

impl Cluster {
    /// A worker that serves and runs nothing.
    pub(super) fn serving_worker(&mut self, number: u64) -> SessionId {
        self.serving_again(number, number, ServingStatus::default())
    }

    /// A session of a worker that has something loaded already.
    pub(super) fn serving_again(
        &mut self,
        session: u64,
        number: u64,
        status: ServingStatus,
    ) -> SessionId {
        let (name, life) = (format!("w{number}"), format!("i{number}"));
        self.register_serving(session, &name, &life, (1, 0), Some((offer(number), status)))
    }

    pub(super) fn tell(&mut self, session: SessionId, status: ServingStatus) {
        let status = Box::new(status);
        self.handle(Command::Serving { session, status });
    }

    /// The worker has loaded all that it was told to, and counted this.
    pub(super) fn obey(&mut self, session: SessionId, stats: impl Fn(u32) -> VersionStats) {
        let plan = self.plans[&session].clone();
        self.tell(session, obeyed(&plan, stats));
    }

    pub(super) fn obey_all(&mut self) {
        for session in self.plans.keys().copied().collect::<Vec<_>>() {
            self.obey(session, |_| VersionStats::default());
        }
    }

    /// The versions that a session was told to serve, and what each gets.
    pub(super) fn serves(&self, session: SessionId) -> Vec<(u32, Traffic)> {
        let models = self.plans.get(&session).into_iter().flat_map(|p| &p.models);
        let versions = models.flat_map(|model| &model.versions);
        versions.map(|v| (v.version, v.traffic)).collect()
    }
}

#[test]
fn a_version_is_live_when_every_replica_has_it_and_the_old_one_stays_warm() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let (one, two) = (cluster.serving_worker(1), cluster.serving_worker(2));
    let with = json!({"model": "m", "replicas": 2});
    deploy_to(&mut cluster, "a", with.clone());
    assert_eq!(last(&cluster).outcome, DeploymentOutcome::InProgress);
    assert_eq!(cluster.serves(one), [(1, Traffic::Standby)]);
    cluster.obey(one, |_| VersionStats::default());
    assert_eq!(live(&cluster, "production"), 0, "one of two has it");
    cluster.obey(two, |_| VersionStats::default());
    assert_eq!(live(&cluster, "production"), 1);
    assert_eq!(cluster.serves(two), [(1, Traffic::Live)]);

    deploy_to(&mut cluster, "b", with);
    assert_eq!(
        cluster.serves(one),
        [(1, Traffic::Live), (2, Traffic::Standby)]
    );
    cluster.obey_all();
    assert_eq!(live(&cluster, "production"), 2);
    assert_eq!(
        cluster.serves(one),
        [(2, Traffic::Live), (1, Traffic::Standby)]
    );
    // Back in one decision, to what is loaded already; what was bad is not kept warm.
    roll_back(&mut cluster).unwrap();
    assert_eq!(cluster.serves(two), [(1, Traffic::Live)]);
}

#[test]
fn a_version_that_no_worker_can_load_never_answers() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let one = cluster.serving_worker(1);
    deploy(&mut cluster, "a");
    cluster.obey_all();
    deploy(&mut cluster, "b");
    let mut status = obeyed(&cluster.plans[&one], |_| VersionStats::default());
    status.versions[1].state = VersionState::Failed("no such network".to_owned());
    cluster.tell(one, status);
    let made = last(&cluster);
    assert_eq!(made.outcome, DeploymentOutcome::CaughtBeforeExposure);
    let note = made.rollout.unwrap().note;
    assert!(
        note.contains("w1") && note.contains("no such network"),
        "{note}"
    );
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)]);
}

#[test]
fn a_lost_replica_is_replaced_with_the_right_version() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let one = cluster.serving_worker(1);
    deploy(&mut cluster, "a");
    cluster.obey_all();
    let two = cluster.serving_worker(2);
    assert_eq!(cluster.serves(two), [], "one replica is enough");
    cluster.handle(Command::WorkerDisconnected {
        session: one,
        how: crate::engine::api::Disconnect::Closed,
    });
    assert_eq!(cluster.serves(two), [], "it may come back");
    cluster.next_deadline();
    assert_eq!(cluster.serves(two), [(1, Traffic::Live)]);
}

#[test]
fn a_draining_worker_answers_until_another_one_does() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let one = cluster.serving_worker(1);
    deploy(&mut cluster, "a");
    cluster.obey_all();
    cluster.handle(Command::WorkerDraining { session: one });
    assert_eq!(
        cluster.serves(one),
        [(1, Traffic::Live)],
        "nobody else could"
    );
    let two = cluster.serving_worker(2);
    assert_eq!(cluster.serves(two), [(1, Traffic::Live)]);
    assert_eq!(cluster.serves(one), [(1, Traffic::Live)], "not yet");
    cluster.obey(two, |_| VersionStats::default());
    assert_eq!(cluster.serves(one), []);
    let replicas = cluster
        .engine
        .replicas(&"production".parse().unwrap(), &"m".parse().unwrap());
    assert_eq!(
        replicas.len(),
        2,
        "the one that leaves has not said that it has nothing"
    );
}

#[test]
fn a_new_leader_finds_replicas_where_they_are() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    cluster.serving_worker(1);
    let two = cluster.serving_worker(2);
    deploy(&mut cluster, "a");
    cluster.obey_all();
    // By name the first one has it; the second takes over, and then another leader comes.
    cluster.handle(Command::WorkerDraining {
        session: SessionId(1),
    });
    cluster.obey(two, |_| VersionStats::default());
    let has = obeyed(&cluster.plans[&two], |_| VersionStats::default());
    cluster.fail_over();
    let one = cluster.serving_again(11, 1, ServingStatus::default());
    assert_eq!(
        cluster.serves(one),
        [(1, Traffic::Live)],
        "it is the only one"
    );
    let two = cluster.serving_again(12, 2, has);
    assert_eq!(cluster.serves(two), [(1, Traffic::Live)]);
    assert_eq!(cluster.serves(one), []);
}

#[test]
fn environments_are_served_apart() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let one = cluster.serving_worker(1);
    deploy_to(
        &mut cluster,
        "a",
        json!({"model": "m", "environment": "staging"}),
    );
    assert_eq!(
        live(&cluster, "staging"),
        1,
        "nobody serves it: it is live at once"
    );
    assert_eq!(cluster.serves(one), []);
    assert_eq!(last(&cluster).id, DeploymentId(1));
}

#[test]
fn replicas_are_spread_and_peers_know_each_other() {
    let mut cluster = Cluster::new();
    cluster.worker(9, 8, 8);
    let sessions = [cluster.serving_worker(1), cluster.serving_worker(2)];
    for model in ["m", "n"] {
        deploy_to(&mut cluster, "a", json!({"model": model}));
        cluster.obey_all();
    }
    // The registration in this harness is always of `m`: one model is enough to see its replicas.
    let all: usize = sessions.iter().map(|s| cluster.serves(*s).len()).sum();
    assert_eq!(all, 1);
    deploy_to(&mut cluster, "b", json!({"model": "m", "replicas": 2}));
    let peers = |session| cluster.plans[&session].models[0].peers.clone();
    assert_eq!(peers(sessions[0]), ["w2:7430"]);
    assert_eq!(peers(sessions[1]), ["w1:7430"]);
}
