//! The server's side of a connection, with TLS or without.

use std::{
    collections::HashMap,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{Tls, peer::Identity};

/// How long a handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);

/// A connection that was accepted.
pub enum Wire {
    /// Without TLS.
    Plain(TcpStream),
    /// With it.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// From where.
    pub address: Option<SocketAddr>,
    /// What its certificate says, if it has one that says something.
    pub identity: Option<Identity>,
}

impl Wire {
    /// Answers a connection: by a handshake if there are certificates, else as it is.
    ///
    /// # Errors
    /// The handshake failed, or took too long.
    pub async fn accept(stream: TcpStream, tls: Option<&Tls>) -> io::Result<Self> {
        let Some(tls) = tls else {
            return Ok(Self::Plain(stream));
        };
        let config = tls.server().await.map_err(io::Error::other)?;
        let handshake = TlsAcceptor::from(config).accept(stream);
        match timeout(HANDSHAKE_WITHIN, handshake).await {
            Ok(stream) => Ok(Self::Tls(Box::new(stream?))),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        match self {
            Self::Plain(stream) => Peer {
                address: stream.peer_addr().ok(),
                identity: None,
            },
            Self::Tls(stream) => {
                let (stream, session) = stream.get_ref();
                let shown = session.peer_certificates().and_then(<[_]>::first);
                Peer {
                    address: stream.peer_addr().ok(),
                    identity: shown.and_then(Identity::of),
                }
            }
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// Tells of refused peers, of each once in a while, so that none can fill the log.
#[derive(Debug, Default)]
pub struct Refusals {
    told: Mutex<HashMap<IpAddr, Instant>>,
}

impl Refusals {
    const AGAIN_AFTER: Duration = Duration::from_secs(60);
    const REMEMBERED: usize = 256;

    /// Tells that a peer was refused, and why.
    pub fn tell(&self, peer: Option<SocketAddr>, why: &dyn std::fmt::Display) {
        let Some(peer) = peer else {
            tracing::debug!(%why, "a connection was lost at its beginning");
            return;
        };
        if self.is_due(peer.ip()) {
            tracing::warn!(%peer, %why, "a peer was refused");
        } else {
            tracing::debug!(%peer, %why, "a peer was refused");
        }
    }

    fn is_due(&self, peer: IpAddr) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| at.elapsed() < Self::AGAIN_AFTER);
        if told.contains_key(&peer) || told.len() >= Self::REMEMBERED {
            return false;
        }
        told.insert(peer, Instant::now());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_of_once_in_a_while_and_not_all_of_too_many() {
        let refusals = Refusals::default();
        let peer = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        assert!(refusals.is_due(peer(1)));
        assert!(!refusals.is_due(peer(1)));
        let told = (0..10_000).filter(|n| refusals.is_due(peer(*n))).count();
        assert_eq!(told + 1, Refusals::REMEMBERED);
    }
}
