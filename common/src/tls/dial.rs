//! The client's side: connections to processes of a cluster, with TLS or without.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Error};
use tower_service::Service;

use super::Tls;
use crate::address::split_address;

/// Opens connections to the processes of a cluster. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    tls: Option<Tls>,
}

impl Dialer {
    /// With these certificates; without any, plain connections.
    #[must_use]
    pub const fn new(tls: Option<Tls>) -> Self {
        Self { tls }
    }

    /// The certificates.
    #[must_use]
    pub const fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// How URLs of this cluster begin.
    #[must_use]
    pub const fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// The process at `host:port`, `http://host:port` or `https://host:port`. Nothing is connected.
    ///
    /// # Errors
    /// What is wrong with the address, in one line.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, String> {
        let (scheme, authority) = split_address(address)?;
        match scheme {
            Some("https") if self.tls.is_none() => {
                return Err(format!(
                    "`{address}` asks for TLS, and no certificate is given: say by `--tls-ca` who signed the cluster's"
                ));
            }
            Some("http") if self.tls.is_some() => {
                return Err(format!(
                    "`{address}` asks for no TLS, but certificates are given: write `https://{authority}`, or leave the certificates out"
                ));
            }
            _ => {}
        }
        let wrong = |e: &dyn std::fmt::Display| format!("`{address}`: {e}");
        // The connector below makes it TLS; tonic's own takes no files that change.
        let endpoint = Endpoint::from_shared(format!("http://{authority}"));
        let endpoint = endpoint.map_err(|e| wrong(&e))?;
        if self.tls.is_none() {
            return Ok(endpoint);
        }
        let origin: Uri = (format!("https://{authority}").parse())
            .map_err(|e: http::uri::InvalidUri| wrong(&e))?;
        Ok(endpoint.origin(origin))
    }

    /// Connects.
    ///
    /// # Errors
    /// Why that failed.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        match &self.tls {
            None => endpoint.connect().await,
            Some(tls) => {
                let connector = Connector { tls: tls.clone() };
                endpoint.connect_with_connector(connector).await
            }
        }
    }

    /// A bare connection to `host:port`, for what is no gRPC.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn open(&self, authority: &str) -> io::Result<Box<dyn Duplex>> {
        match &self.tls {
            None => {
                let stream = TcpStream::connect(authority).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Some(tls) => {
                let uri = format!("https://{authority}")
                    .parse()
                    .map_err(io::Error::other)?;
                let connector = Connector { tls: tls.clone() };
                Ok(Box::new(connector.dial(uri).await?.into_inner()))
            }
        }
    }

    /// A channel that is connected when it is used.
    #[must_use]
    pub fn connect_lazy(&self, endpoint: &Endpoint) -> Channel {
        match &self.tls {
            None => endpoint.connect_lazy(),
            Some(tls) => endpoint.connect_with_connector_lazy(Connector { tls: tls.clone() }),
        }
    }
}

/// A connection, with TLS or without.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Makes a connection and its handshake.
#[derive(Clone)]
struct Connector {
    tls: Tls,
}

impl Connector {
    async fn dial(self, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let authority = uri.authority();
        let authority = authority.ok_or_else(|| invalid(format!("`{uri}` names no host")))?;
        let host = authority.host();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|e| invalid(format!("`{host}`: {e}")))?;
        let stream = TcpStream::connect(authority.as_str()).await?;
        stream.set_nodelay(true)?;
        let config = self.tls.client().await;
        let connector = TlsConnector::from(config);
        Ok(TokioIo::new(connector.connect(name, stream).await?))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}
