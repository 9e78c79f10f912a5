//! What a worker makes of leaders that it must not work for: of another release, or of a past term.
//! They are played here, since no real one can be of another release or go back in time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use emberline_common::ids::{Epoch, WorkerName};
use emberline_proto::{
    WORKER_PROTOCOL_VERSION,
    v1::{
        LeaderMessage, Registered, WorkerMessage,
        leader_message::Message,
        worker_service_server::{WorkerService, WorkerServiceServer},
    },
};
use emberline_worker::{LeaderSeen, RunningWorker, Worker, WorkerConfig};
use futures::{Stream, StreamExt as _, stream};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

const SOON: Duration = Duration::from_secs(30);

/// Who answers a session, and ends it when it is another one's turn.
#[derive(Clone, Copy, PartialEq)]
struct Leader {
    version: u32,
    epoch: u64,
}

struct Leaders {
    turn: watch::Receiver<Leader>,
    sessions: Arc<AtomicU64>,
    object_store: String,
}

#[tonic::async_trait]
impl WorkerService for Leaders {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<LeaderMessage, Status>> + Send>>;

    async fn session(
        &self,
        _: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.sessions.fetch_add(1, Ordering::SeqCst);
        let leader = *self.turn.borrow();
        let registered = LeaderMessage {
            message: Some(Message::Registered(Registered {
                epoch: leader.epoch,
                protocol_version: leader.version,
                heartbeat_interval_ms: 1000,
                abandon: Vec::new(),
                object_store_url: self.object_store.clone(),
            })),
        };
        let mut turn = self.turn.clone();
        let end = stream::once(async move {
            // At the end of the test, too.
            let _ = turn.wait_for(|now| *now != leader).await;
            Err(Status::unavailable("its time is over"))
        });
        let begin = stream::iter([Ok(registered)]);
        Ok(Response::new(Box::pin(begin.chain(end))))
    }
}

/// A worker, and the address at which leaders follow one another.
struct Scene {
    worker: RunningWorker,
    turn: watch::Sender<Leader>,
    sessions: Arc<AtomicU64>,
    _directory: tempfile::TempDir,
}

impl Scene {
    async fn begin(first: Leader) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let objects = directory.path().join("objects");
        std::fs::create_dir(&objects).unwrap();
        let (now, turn) = watch::channel(first);
        let sessions = Arc::new(AtomicU64::new(0));
        let leaders = WorkerServiceServer::new(Leaders {
            turn,
            sessions: Arc::clone(&sessions),
            object_store: format!("file://{}", objects.display()),
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<WorkerServiceServer<Leaders>>().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder()
            .add_service(health_service)
            .add_service(leaders)
            .serve_with_incoming(TcpListenerStream::new(listener));
        // It ends with the test's runtime.
        tokio::spawn(server);
        let config = WorkerConfig {
            name: WorkerName::new("w").unwrap(),
            leaders: vec![address.to_string()],
            state_dir: directory.path().join("worker"),
            ..WorkerConfig::default()
        };
        let worker = Worker::builder(config).start().await.unwrap();
        Self {
            worker,
            turn: now,
            sessions,
            _directory: directory,
        }
    }

    /// Waits until the worker has opened so many more sessions.
    async fn tried(&self, more: u64) {
        let least = self.sessions.load(Ordering::SeqCst) + more;
        let reached = async {
            while self.sessions.load(Ordering::SeqCst) < least {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, reached).await.expect("it goes on trying");
    }

    fn leader(&self) -> Option<LeaderSeen> {
        self.worker.leader().borrow().clone()
    }

    async fn works_for(&self, epoch: u64) {
        let mut leader = self.worker.leader();
        let found = leader.wait_for(|seen| {
            let seen = seen.as_ref().map(|leader| leader.epoch);
            seen == Some(Epoch(epoch))
        });
        let found = timeout(SOON, found).await;
        drop(found.expect("it works for that leader").unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_of_another_release_is_waited_out() {
    let scene = Scene::begin(Leader {
        version: WORKER_PROTOCOL_VERSION + 1,
        epoch: 1,
    })
    .await;
    scene.tried(3).await;
    assert_eq!(scene.leader(), None);
    scene.turn.send_replace(Leader {
        version: WORKER_PROTOCOL_VERSION,
        epoch: 2,
    });
    scene.works_for(2).await;
    scene.worker.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_of_a_past_term_is_not_worked_for() {
    let of = |epoch| Leader {
        version: WORKER_PROTOCOL_VERSION,
        epoch,
    };
    let scene = Scene::begin(of(5)).await;
    scene.works_for(5).await;
    scene.turn.send_replace(of(4));
    scene.tried(3).await;
    assert_eq!(scene.leader(), None);
    scene.turn.send_replace(of(6));
    scene.works_for(6).await;
    scene.worker.shutdown().await;
}
