//! `health`: whether a process is well, for those who start it again if it is not.

use std::time::Duration;

use bytes::Bytes;
use emberline_common::address::is_host_port;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    args::{ClusterArguments, Healthy},
    exit::Exit,
    leader_channel::innermost,
    output,
    security::Security,
};

/// How long it may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Asks it.
pub async fn health(
    cluster: &ClusterArguments,
    what: Healthy,
    address: Option<String>,
    quiet: bool,
) -> anyhow::Result<()> {
    let security = cluster.security.read()?;
    let address = address.unwrap_or_else(|| {
        let default = match what {
            Healthy::Coordinator => "127.0.0.1:7420",
            Healthy::Worker => "127.0.0.1:9464",
        };
        default.to_owned()
    });
    if !is_host_port(&address) {
        return Err(Exit::input(format!("`{address}` is no `host:port`")).into());
    }
    let asked = async {
        match what {
            Healthy::Coordinator => coordinator(&security, &address).await,
            Healthy::Worker => worker(&security, &address).await,
        }
    };
    let answer = tokio::time::timeout(ANSWER_WITHIN, asked).await;
    let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_WITHIN:?}")));
    match answer {
        Ok(()) if quiet => Ok(()),
        Ok(()) => Ok(output::line("well")?),
        Err(why) => Err(Exit::cluster(format!("not well: {address}: {why}")).into()),
    }
}

async fn coordinator(security: &Security, address: &str) -> Result<(), String> {
    let endpoint = security.dialer.endpoint(address)?;
    let channel = security.dialer.connect(&endpoint).await;
    let channel = channel.map_err(|e| innermost(&e))?;
    let mut client = HealthClient::new(channel);
    let answer = client.check(HealthCheckRequest::default()).await;
    let answer = answer.map_err(|status| status.message().to_owned())?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => Err(format!("it says {}", status.as_str_name())),
    }
}

async fn worker(security: &Security, address: &str) -> Result<(), String> {
    let stream = security.dialer.open(address).await;
    let stream = stream.map_err(|e| e.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| innermost(&e))?;
    let request = Request::get("/healthz")
        .header(header::HOST, address)
        .body(Empty::<Bytes>::new())
        .map_err(|e| e.to_string())?;
    let asked = async {
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|e| innermost(&e))?;
        match answer.status() {
            StatusCode::OK => Ok(()),
            StatusCode::SERVICE_UNAVAILABLE => Err("it has no session with a leader".to_owned()),
            status => Err(format!("it answers {status}")),
        }
    };
    tokio::select! {
        answer = asked => answer,
        // It drives the request; when it ends first, there is no answer.
        ended = connection => match ended {
            Ok(()) => Err("it closed the connection".to_owned()),
            Err(e) => Err(innermost(&e)),
        },
    }
}
