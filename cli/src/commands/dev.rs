//! `dev`: the embedded cluster, staying up.

use std::net::SocketAddr;

use emberline_common::ids::EnvironmentName;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::ClusterArguments,
    embedded::{EmbeddedCluster, ServeModels, StartError},
    exit::Exit,
    output,
};

/// Where models are served, and which.
pub struct Serve<'a> {
    /// As it was given.
    pub listen: Option<&'a str>,
    /// The environment.
    pub environment: &'a str,
}

fn loopback(listen: &str) -> Result<SocketAddr, Exit> {
    let address: SocketAddr = listen.parse().map_err(|_| {
        Exit::input(format!(
            "`{listen}` is no address: write e.g. `127.0.0.1:7420`"
        ))
    })?;
    if !address.ip().is_loopback() {
        return Err(Exit::input(format!(
            "`{listen}` is no loopback address: without TLS and tokens only this machine may connect"
        )));
    }
    Ok(address)
}

/// Ports between where the coordinator serves and where models are served.
const PORTS_APART: u16 = 10;

/// Starts it and waits for Ctrl-C or SIGTERM.
pub async fn dev(
    arguments: &ClusterArguments,
    listen: &str,
    workers: u32,
    serve: Serve<'_>,
    quiet: bool,
) -> anyhow::Result<()> {
    let address = loopback(listen)?;
    let models = match serve.listen {
        Some(listen) => loopback(listen)?,
        None if address.port() == 0 => address,
        None => SocketAddr::new(address.ip(), address.port().saturating_add(PORTS_APART)),
    };
    let environment = EnvironmentName::new(serve.environment)
        .map_err(|e| Exit::input(format!("`--environment`: {e}")))?;
    let serve = ServeModels {
        listen: models,
        environment,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let cluster = match EmbeddedCluster::start(
        arguments,
        arguments.events.config()?,
        address,
        workers,
        Some(serve),
    )
    .await
    {
        Ok(cluster) => cluster,
        Err(StartError::Held(why)) => return Err(Exit::cluster(why).into()),
        Err(StartError::Failed(e)) => return Err(Exit::cluster(format!("{e:#}")).into()),
    };
    if !quiet {
        output::line(format!(
            "emberline serves on http://{} with {workers} workers; Ctrl-C stops it",
            cluster.address()
        ))?;
        if let Some(models) = cluster.models_address() {
            output::line(format!("models are served on http://{models}"))?;
        }
    }
    let failed = tokio::select! {
        signal = tokio::signal::ctrl_c() => signal.err().map(anyhow::Error::from),
        _ = terminate.recv() => None,
        stopped = cluster.stopped() => Some(stopped.into()),
    };
    let closed = cluster.shutdown().await;
    failed.map_or(closed, Err)
}
