//! The fast path of a failover: a follower holds a connection to the leader, and acts on its closing.
//!
//! When a process dies, its machine closes its connections at once; then, and only then, a follower
//! looks whether the leader's address still takes connections, and if it does not, ends the leader's
//! lease. A connection that only falls silent says nothing: a machine that vanished, a cut cable and a
//! leader that is paused look alike, and the lease decides. If a living leader is deposed by mistake,
//! nothing is lost but time, since every commit is fenced by the leader key.

use std::{io::ErrorKind, sync::Arc, time::Duration};

use emberline_common::tls::Dialer;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::store::{Leader, StateStore};

const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// How long a connection may take when it is asked whether the leader lives.
const LIVES_WITHIN: Duration = Duration::from_millis(150);
const TRIES: u32 = 2;
/// A leader that lives, or of which nothing is known, is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// How the connection to a leader ended, or did not begin.
enum Seen {
    /// It was open, and has been closed.
    Closed,
    /// It was refused: nobody listens there.
    Refused,
    /// Nothing is known.
    Nothing,
}

/// Watches over the leader of the time, unless that is us. Never ends.
pub(crate) async fn attend(store: Arc<dyn StateStore>, own_address: String, dialer: Dialer) {
    let mut seen = store.watch_leader();
    loop {
        let leader = seen.borrow_and_update().clone();
        let Some(leader) = leader.filter(|l| l.address != own_address && !l.address.is_empty())
        else {
            if seen.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            changed = seen.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = watch_over(store.as_ref(), &leader, &dialer) => {}
        }
    }
}

async fn watch_over(store: &dyn StateStore, leader: &Leader, dialer: &Dialer) {
    let dead = match until_closed(&leader.address, dialer).await {
        Seen::Closed => !lives(&leader.address).await,
        Seen::Refused => true,
        Seen::Nothing => false,
    };
    if dead {
        tracing::info!(leader = %leader.name, term = %leader.epoch, "the leader's connection closed: ending its term");
        if let Err(e) = store.depose(leader.epoch).await {
            tracing::warn!(error = %e, "the leader's lease has to run out");
        }
    }
    sleep(LOOK_AGAIN).await;
}

/// Follows the leader's health until the connection ends. There is no keep-alive on it: silence must
/// not close it.
async fn until_closed(address: &str, dialer: &Dialer) -> Seen {
    let Ok(endpoint) = dialer.endpoint(address) else {
        return std::future::pending().await;
    };
    let endpoint = endpoint.connect_timeout(CONNECT_WITHIN).tcp_nodelay(true);
    let channel = match dialer.connect(&endpoint).await {
        Ok(channel) => channel,
        Err(e) => {
            let refused = is_refused(&e);
            return if refused {
                Seen::Refused
            } else {
                Seen::Nothing
            };
        }
    };
    let request = HealthCheckRequest::default();
    let Ok(watched) = HealthClient::new(channel).watch(request).await else {
        return Seen::Closed;
    };
    let mut health = watched.into_inner();
    while let Ok(Some(_)) = health.message().await {}
    Seen::Closed
}

fn is_refused(e: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(e);
    while let Some(e) = next {
        if let Some(io) = e.downcast_ref::<std::io::Error>() {
            return io.kind() == ErrorKind::ConnectionRefused;
        }
        next = e.source();
    }
    false
}

/// Whether the address takes connections.
async fn lives(address: &str) -> bool {
    for _ in 0..TRIES {
        match timeout(LIVES_WITHIN, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return true,
            Ok(Err(e)) if e.kind() == ErrorKind::ConnectionRefused => return false,
            Ok(Err(_)) | Err(_) => {}
        }
    }
    false
}
