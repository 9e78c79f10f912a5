//! `dev`: the embedded cluster, staying up.

use std::net::SocketAddr;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::ClusterArguments,
    embedded::{EmbeddedCluster, StartError},
    exit::Exit,
    output,
};

/// Starts it and waits for Ctrl-C or SIGTERM.
pub async fn dev(
    arguments: &ClusterArguments,
    listen: &str,
    workers: u32,
    quiet: bool,
) -> anyhow::Result<()> {
    let address: SocketAddr = listen.parse().map_err(|_| {
        Exit::input(format!(
            "`{listen}` is no address: write e.g. `127.0.0.1:7420`"
        ))
    })?;
    if !address.ip().is_loopback() {
        let line = format!(
            "`{listen}` is no loopback address: without TLS and tokens only this machine may connect"
        );
        return Err(Exit::input(line).into());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let cluster =
        match EmbeddedCluster::start(arguments, arguments.events.config()?, address, workers).await
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
    }
    let failed = tokio::select! {
        signal = tokio::signal::ctrl_c() => signal.err().map(anyhow::Error::from),
        _ = terminate.recv() => None,
        stopped = cluster.stopped() => Some(stopped.into()),
    };
    let closed = cluster.shutdown().await;
    failed.map_or(closed, Err)
}
