//! The connections of the server: counted, told apart by how they begin (HTTP/2 or HTTP/1.1), and
//! ended when the server has stopped. Nobody who says nothing, or says it slowly, holds up more than
//! his own connection, and that for a bounded time.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use emberline_common::tls::{Refusals, Tls, Wire};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{config::ServerLimits, http_service::HttpService};

/// How every HTTP/2 connection begins (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The largest list of headers.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Flow control windows.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;
/// A connection that says nothing is asked, and closed when it does not answer.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait after a failed accept: it fails at once while there are too many open files.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// Accepts and answers until `stop`, then ends what it has taken; cuts off what is left at `close`.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    service: HttpService,
    limits: ServerLimits,
    stop: CancellationToken,
    close: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(limits.max_connections));
    let refusals = Arc::new(Refusals::default());
    let mut connections = JoinSet::new();
    let accepting = async {
        loop {
            // Ended ones are let go of.
            while connections.try_join_next().is_some() {}
            // The semaphore is never closed.
            let Ok(counted) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = Connection {
                        service: service.clone(),
                        tls: tls.clone(),
                        refusals: Arc::clone(&refusals),
                        limits: limits.clone(),
                        stop: stop.clone(),
                    };
                    let close = close.clone();
                    connections.spawn(async move {
                        let _counted = counted;
                        tokio::select! {
                            () = connection.serve(stream) => {}
                            () = close.cancelled() => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        () = stop.cancelled() => {}
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!(%error, "a connection had panicked");
        }
    }
}

struct Connection {
    service: HttpService,
    tls: Option<Tls>,
    refusals: Arc<Refusals>,
    limits: ServerLimits,
    stop: CancellationToken,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        // An answer is a small packet that must not wait for the next one.
        if stream.set_nodelay(true).is_err() {
            return;
        }
        let from = stream.peer_addr().ok();
        let begun = async {
            match Wire::accept(stream, self.tls.as_ref()).await {
                Ok(stream) => Begun::read(stream, self.limits.body_within).await,
                Err(why) => {
                    self.refusals.tell(from, &why);
                    Err(why)
                }
            }
        };
        let begun = tokio::select! {
            begun = tokio::time::timeout(self.limits.head_within, begun) => begun,
            () = self.stop.cancelled() => return,
        };
        // Who says nothing in time gets no answer.
        let Ok(Ok(begun)) = begun else { return };
        let ended = if begun.begins_http2() {
            self.serve_http2(begun).await
        } else {
            self.serve_http1(begun).await
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke");
        }
    }

    async fn serve_http2(self, stream: Begun) -> Result<(), hyper::Error> {
        let serving = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.limits.max_streams)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(KEEP_ALIVE_EVERY)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .max_pending_accept_reset_streams(64)
            .serve_connection(TokioIo::new(stream), self.service);
        let mut serving = std::pin::pin!(serving);
        tokio::select! {
            ended = serving.as_mut() => return ended,
            () = self.stop.cancelled() => {}
        }
        serving.as_mut().graceful_shutdown();
        serving.await
    }

    async fn serve_http1(self, stream: Begun) -> Result<(), hyper::Error> {
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head_within)
            .max_header_size(MAX_HEADER_BYTES as usize)
            .serve_connection(TokioIo::new(stream), self.service);
        let mut serving = std::pin::pin!(serving);
        tokio::select! {
            ended = serving.as_mut() => return ended,
            () = self.stop.cancelled() => {}
        }
        serving.as_mut().graceful_shutdown();
        serving.await
    }
}

/// A connection whose first bytes have been looked at. Over HTTP/1.1 the server's own library waits
/// without an end for somebody to take an answer; here that has one.
struct Begun {
    first: Bytes,
    stream: Wire,
    taken_within: Duration,
    /// Since when nothing can be written.
    stuck: Option<Pin<Box<Sleep>>>,
}

impl Begun {
    async fn read(mut stream: Wire, taken_within: Duration) -> io::Result<Self> {
        let mut first = Vec::with_capacity(PREFACE.len());
        while first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
            let mut rest = [0; PREFACE.len()];
            let left = PREFACE.len() - first.len();
            let read = stream.read(&mut rest[..left]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            first.extend_from_slice(&rest[..read]);
        }
        Ok(Self {
            first: first.into(),
            stream,
            taken_within,
            stuck: None,
        })
    }

    /// Gives the connection up when the other side has taken nothing for too long.
    fn patiently<T>(
        &mut self,
        cx: &mut Context<'_>,
        done: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.stuck = None;
            return done;
        }
        let within = self.taken_within;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(sleep(within)));
        stuck
            .as_mut()
            .poll(cx)
            .map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn begins_http2(&self) -> bool {
        &self.first[..] == PREFACE
    }
}

impl AsyncRead for Begun {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let taken = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first[..taken]);
        self.first.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.patiently(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.patiently(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.patiently(cx, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.patiently(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
