//! The worker's one page: its metrics, for Prometheus to take.
//!
//! A small HTTP/1.1 server that answers nothing else. It is bounded in connections and in time, so
//! that nobody who asks it can hold up the worker.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use emberline_common::telemetry::{METRICS_PATH, Telemetry, metrics_page, text_page};
use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 32;
/// How long a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection may live.
const CONNECTION_WITHIN: Duration = Duration::from_secs(120);
/// How long to wait after a failed accept: it fails at once while there are too many open files.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// The server. It ends when it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Scrape {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Scrape {
    /// Serves on `host:port`.
    pub async fn start(listen: &str, telemetry: Telemetry) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, telemetry, stop.clone()));
        Ok(Self {
            address,
            stop,
            server,
        })
    }

    /// Where it serves.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it and what it is answering.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Err(error) = (&mut self.server).await
            && error.is_panic()
        {
            tracing::error!(%error, "the page of metrics had panicked");
        }
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Until it is stopped. What is being answered then is cut off.
async fn serve(listener: TcpListener, telemetry: Telemetry, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
                    let telemetry = telemetry.clone();
                    connections.spawn(async move {
                        let _counted = counted;
                        // Who does not end it by itself is cut off.
                        let answering = answer_all(stream, telemetry);
                        let _ = tokio::time::timeout(CONNECTION_WITHIN, answering).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics was not accepted");
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        () = stop.cancelled() => {}
    }
    connections.shutdown().await;
}

async fn answer_all(stream: TcpStream, telemetry: Telemetry) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(&request, &telemetry);
        async { Ok::<_, std::convert::Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection for metrics broke");
    }
}

fn answer(request: &Request<Incoming>, telemetry: &Telemetry) -> Response<String> {
    if request.uri().path() == METRICS_PATH {
        return metrics_page(telemetry, request.method());
    }
    text_page(
        StatusCode::NOT_FOUND,
        format!("there is {METRICS_PATH} only\n"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(address: SocketAddr, first_line: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{first_line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn measured() -> Telemetry {
        let setup = emberline_common::telemetry::Setup {
            service: "emberline-worker",
            instance: "test".to_owned(),
        };
        Telemetry::start(&setup).unwrap()
    }

    #[tokio::test]
    async fn it_shows_the_metrics_and_nothing_else() {
        let telemetry = measured();
        let counter = telemetry.meter().u64_counter("emberline.shown").build();
        counter.add(3, &[]);
        let page = Scrape::start("127.0.0.1:0", telemetry).await.unwrap();
        let shown = ask(page.address(), "GET /metrics").await;
        assert!(shown.starts_with("HTTP/1.1 200"), "{shown}");
        assert!(shown.contains("text/plain; version=0.0.4"), "{shown}");
        assert!(shown.contains("emberline_shown_total"), "{shown}");
        let other = ask(page.address(), "GET /other").await;
        assert!(other.starts_with("HTTP/1.1 404"), "{other}");
        let posted = ask(page.address(), "POST /metrics").await;
        assert!(posted.starts_with("HTTP/1.1 405"), "{posted}");
        let address = page.address();
        page.stop().await;
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn who_says_nothing_does_not_keep_it_from_ending() {
        let page = Scrape::start("127.0.0.1:0", Telemetry::default());
        let page = page.await.unwrap();
        let mut silent = TcpStream::connect(page.address()).await.unwrap();
        assert!(ask(page.address(), "GET /metrics").await.contains("200 OK"));
        page.stop().await;
        assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    }
}
