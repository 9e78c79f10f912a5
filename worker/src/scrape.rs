//! The worker's two pages: its metrics, for Prometheus to take, and whether it is well, for whoever
//! starts it again if it is not: it is, while it has a session with a leader.
//!
//! A small server that answers nothing else; HTTP/1.1, and where it speaks TLS also HTTP/2, which some clients
//! (Prometheus is one) choose there by themselves. It is bounded in connections and in time, so
//! that nobody who asks it can hold up the worker.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use emberline_common::{
    telemetry::{METRICS_PATH, Telemetry, metrics_page, text_page},
    tls::{Refusals, Tls, Wire},
};
use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::search::LeaderSeen;

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 32;
/// Requests at once on one of them.
const MAX_STREAMS: u32 = 16;
/// How long a request may take to arrive.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection may live.
const CONNECTION_WITHIN: Duration = Duration::from_secs(120);
/// How long to wait after a failed accept: it fails at once while there are too many open files.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// What is shown.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    pub telemetry: Telemetry,
    /// The leader that there is a session with.
    pub leader: watch::Receiver<Option<LeaderSeen>>,
}

/// Where the worker says whether it is well.
const HEALTH_PATH: &str = "/healthz";

/// The server. It ends when it is stopped or dropped.
#[derive(Debug)]
pub(crate) struct Scrape {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

impl Scrape {
    /// Serves on `host:port`.
    pub async fn start(listen: &str, page: Page, tls: Option<Tls>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, page, tls, stop.clone()));
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
async fn serve(listener: TcpListener, page: Page, tls: Option<Tls>, stop: CancellationToken) {
    let refusals = Arc::new(Refusals::default());
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
                Ok((stream, from)) => {
                    let (page, tls) = (page.clone(), tls.clone());
                    let refusals = Arc::clone(&refusals);
                    connections.spawn(async move {
                        let _counted = counted;
                        match Wire::accept(stream, tls.as_ref()).await {
                            Ok(stream) => {
                                // Who does not end it by itself is cut off.
                                let answering = answer_all(stream, page);
                                let _ = tokio::time::timeout(CONNECTION_WITHIN, answering).await;
                            }
                            Err(why) => refusals.tell(Some(from), &why),
                        }
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

async fn answer_all(stream: Wire, page: Page) {
    let mut serves = auto::Builder::new(TokioExecutor::new());
    serves
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN);
    serves
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    if matches!(stream, Wire::Plain(_)) {
        // Nobody has said who he is: what is no request is not waited for to become one.
        serves = serves.http1_only();
    }
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(&request, &page);
        async { Ok::<_, std::convert::Infallible>(answer) }
    });
    let served = serves.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection for metrics broke");
    }
}

fn answer(request: &Request<Incoming>, page: &Page) -> Response<String> {
    match request.uri().path() {
        METRICS_PATH => metrics_page(&page.telemetry, request.method()),
        HEALTH_PATH => match &*page.leader.borrow() {
            Some(leader) => text_page(
                StatusCode::OK,
                format!("there is a session with {}\n", leader.address),
            ),
            None => text_page(
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no session with a leader\n".to_owned(),
            ),
        },
        _ => text_page(
            StatusCode::NOT_FOUND,
            format!("there are {METRICS_PATH} and {HEALTH_PATH} only\n"),
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use emberline_common::ids::Epoch;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

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
        let (leader, seen) = watch::channel(None);
        let page = Page {
            telemetry,
            leader: seen,
        };
        let page = Scrape::start("127.0.0.1:0", page, None).await.unwrap();
        let health = ask(page.address(), "GET /healthz").await;
        assert!(health.starts_with("HTTP/1.1 503"), "{health}");
        leader.send_replace(Some(LeaderSeen {
            address: "a:1".to_owned(),
            epoch: Epoch(1),
        }));
        let health = ask(page.address(), "GET /healthz").await;
        assert!(health.starts_with("HTTP/1.1 200"), "{health}");
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
        let page = Page {
            telemetry: Telemetry::default(),
            leader: watch::channel(None).1,
        };
        let page = Scrape::start("127.0.0.1:0", page, None).await.unwrap();
        let mut silent = TcpStream::connect(page.address()).await.unwrap();
        assert!(ask(page.address(), "GET /metrics").await.contains("200 OK"));
        page.stop().await;
        assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn no_more_connections_than_there_is_room_for_are_taken_at_once() {
        let page = Page {
            telemetry: Telemetry::default(),
            leader: watch::channel(None).1,
        };
        let page = Scrape::start("127.0.0.1:0", page, None).await.unwrap();
        let answered = async |stream: &mut TcpStream| {
            let mut first = [0; 8];
            stream.read_exact(&mut first).await.is_ok() && &first == b"HTTP/1.1"
        };
        let ask = async || {
            let mut stream = TcpStream::connect(page.address()).await.unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n";
            stream.write_all(request).await.unwrap();
            stream
        };
        let mut held = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let mut stream = ask().await;
            assert!(answered(&mut stream).await);
            held.push(stream);
        }
        let mut one_more = ask().await;
        let within = Duration::from_millis(100);
        let waits = tokio::time::timeout(within, answered(&mut one_more)).await;
        assert!(waits.is_err(), "one more was taken");
        drop(held.pop());
        assert!(answered(&mut one_more).await);
        // The others are let go as well, for they ask nothing more.
        for mut idle in held {
            while idle.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
        }
        page.stop().await;
    }
}
