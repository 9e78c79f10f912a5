//! The connections of the server: counted, answered with TLS where there are certificates, and closed
//! when the coordinator has stopped.
//!
//! A graceful stop waits for open calls, and some calls never end by themselves (a client that
//! watches the health, say). So every connection has an end of its own: when the grace after the
//! stop is over, it reads and writes nothing any more.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use emberline_common::tls::{Peer, Refusals, Tls, Wire};
use futures::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::prompt::Prompt;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// How long to wait after a failed accept: it fails at once while there are too many open files.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// A connection that ends when it is told so.
pub(super) struct Connection {
    stream: Prompt<Wire>,
    peer: Peer,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    _counted: OwnedSemaphorePermit,
}

/// What takes connections in.
struct Accepting {
    listener: TcpListener,
    tls: Option<Tls>,
    close: CancellationToken,
    room: Arc<Semaphore>,
    /// Handshakes under way. They are counted as connections, and each has its time limit.
    handshakes: JoinSet<Shaken>,
    refusals: Refusals,
}

/// How a handshake ended.
struct Shaken {
    from: Option<SocketAddr>,
    stream: io::Result<Wire>,
    counted: OwnedSemaphorePermit,
}

/// Accepts connections, each of which ends when `close` is cancelled.
pub(super) fn accept(
    listener: TcpListener,
    tls: Option<Tls>,
    close: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let accepting = Accepting {
        listener,
        tls,
        close,
        room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        handshakes: JoinSet::new(),
        refusals: Refusals::default(),
    };
    stream::unfold(accepting, |mut accepting| async {
        let connection = accepting.next().await?;
        Some((Ok(connection), accepting))
    })
}

impl Accepting {
    async fn next(&mut self) -> Option<Connection> {
        loop {
            tokio::select! {
                Some(shaken) = self.handshakes.join_next() => match shaken {
                    Ok(Shaken { stream: Ok(stream), counted, .. }) => {
                        return Some(self.connection(stream, counted));
                    }
                    Ok(Shaken { from, stream: Err(why), .. }) => self.refusals.tell(from, &why),
                    Err(error) => tracing::error!(%error, "a handshake had panicked"),
                },
                taken = take(&self.listener, &self.room) => {
                    let (stream, counted) = taken?;
                    let Some(tls) = self.tls.clone() else {
                        return Some(self.connection(Wire::Plain(stream), counted));
                    };
                    self.handshakes.spawn(async move {
                        let from = stream.peer_addr().ok();
                        let stream = Wire::accept(stream, Some(&tls)).await;
                        Shaken { from, stream, counted }
                    });
                }
            }
        }
    }

    fn connection(&self, stream: Wire, counted: OwnedSemaphorePermit) -> Connection {
        Connection {
            peer: stream.peer(),
            stream: Prompt::new(stream),
            closed: Box::pin(self.close.clone().cancelled_owned()),
            _counted: counted,
        }
    }
}

/// The next connection. `None` is never given: the semaphore is never closed.
async fn take(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    loop {
        let counted = Arc::clone(room).acquire_owned().await.ok()?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(error = %e, "a connection was not accepted");
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        // An assignment is a small packet that must not wait for the next one.
        match stream.set_nodelay(true) {
            Ok(()) => return Some((stream, counted)),
            Err(e) => tracing::debug!(error = %e, "a connection was lost at its beginning"),
        }
    }
}

impl Connection {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match Future::poll(self.closed.as_mut(), cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
