//! `worker`: one of a cluster's workers, until it is told to stop.

use std::{
    collections::BTreeMap, fs::File, net::IpAddr, ops::RangeInclusive, path::Path, sync::Arc,
    time::Duration,
};

use emberline_common::{
    ids::{EnvironmentName, WorkerName},
    labels,
    resources::Resources,
    spec::DurationText,
};
use emberline_serve::{InferenceServer, ServeConfig};
use emberline_worker::{RunningWorker, Worker, WorkerConfig, WorkerError, kinds::collect::Reach};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    args::{ClusterArguments, WorkerArguments},
    embedded::all_stages,
    exit::Exit,
    output,
    security::Security,
    telemetry,
};

/// What `--orphan-grace` may be.
const ORPHAN_GRACE: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(30 * 24);

/// Works until SIGTERM or Ctrl-C; a second one stops at once.
pub async fn worker(
    cluster: &ClusterArguments,
    arguments: &WorkerArguments,
    quiet: bool,
) -> anyhow::Result<()> {
    let security = cluster.security.read()?;
    let config = config(cluster, arguments, &security)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _lock = lock(&cluster.state_dir)?;
    let name = config.name.clone();
    let serve = serve(&config, arguments)?;
    let reach = cluster.stages.reach(Reach::default(), &cluster.state_dir)?;
    let mut worker = Worker::builder(config).stages(all_stages(reach));
    if let Some(config) = serve {
        let server = InferenceServer::start(config).await;
        let server = server.map_err(|e| Exit::cluster(e.to_string()))?;
        if !quiet {
            output::line(format!(
                "worker {name} serves models of {} on {}://{}",
                arguments.environment,
                security.dialer.scheme(),
                server.address()
            ))?;
        }
        worker = worker.serving(Arc::new(server));
    }
    let worker = worker.start().await;
    let worker = worker.map_err(|e| match e {
        WorkerError::Config { .. } => Exit::input(e.to_string()),
        WorkerError::StateDir { .. } | WorkerError::Metrics { .. } => Exit::cluster(e.to_string()),
    })?;
    let told = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = worker.told_to_drain() => true,
        ended = tell(&worker, &name, quiet) => return ended,
    };
    if !told {
        return stop(worker, arguments, &name, quiet, terminate, interrupt).await;
    }
    if !quiet {
        output::line(format!("worker {name} drains"))?;
    }
    tokio::select! {
        () = worker.idle() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop(worker, arguments, &name, quiet, terminate, interrupt).await
}

/// Gives back what runs and leaves; another signal leaves at once.
async fn stop(
    worker: RunningWorker,
    arguments: &WorkerArguments,
    name: &WorkerName,
    quiet: bool,
    mut terminate: Signal,
    mut interrupt: Signal,
) -> anyhow::Result<()> {
    if !quiet {
        output::line(format!("worker {name} stops"))?;
    }
    let drained = worker.drain(arguments.drain_timeout.0);
    tokio::select! {
        () = drained => Ok(()),
        _ = terminate.recv() => Err(stopped_twice()),
        _ = interrupt.recv() => Err(stopped_twice()),
    }
}

fn stopped_twice() -> anyhow::Error {
    Exit::new(
        crate::exit::INTERRUPTED,
        "stopped at once: what ran is found lost and runs elsewhere",
    )
    .into()
}

/// Says each new session. Never ends.
async fn tell(worker: &RunningWorker, name: &WorkerName, quiet: bool) -> anyhow::Result<()> {
    let mut leader = worker.leader();
    loop {
        let now = leader.borrow_and_update().clone();
        if let Some(now) = now
            && !quiet
        {
            output::line(format!(
                "worker {name} has a session with {} (term {})",
                now.address, now.epoch
            ))?;
        }
        if leader.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

fn config(
    cluster: &ClusterArguments,
    arguments: &WorkerArguments,
    security: &Security,
) -> Result<WorkerConfig, Exit> {
    let Some(server) = &cluster.server else {
        return Err(Exit::input(
            "say by `--server host:port,…` where the coordinators are",
        ));
    };
    let name = arguments.name.clone().unwrap_or_else(machine_name);
    let name = WorkerName::new(&name).map_err(|e| Exit::input(format!("`--name {name}`: {e}")))?;
    let mut labels = BTreeMap::new();
    for label in &arguments.labels {
        let Some((key, value)) = label.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            return Err(Exit::input(format!("`--label {label}` is not `key=value`")));
        };
        if labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(Exit::input(format!("`--label {key}=…` is given twice")));
        }
    }
    labels::check(&labels).map_err(|why| Exit::input(format!("`--label`: {why}")))?;
    let leaders: Vec<String> = server.split(',').map(|s| s.trim().to_owned()).collect();
    for leader in &leaders {
        let checked = security.dialer.endpoint(leader);
        checked.map_err(|why| Exit::input(format!("`--server`: {why}")))?;
    }
    if let Some(tls) = security.dialer.tls() {
        if arguments.serve.is_some() || arguments.metrics_listen.is_some() {
            tls.can_serve().map_err(|e| {
                Exit::input(format!("{e}: give them by `--tls-cert` and `--tls-key`"))
            })?;
        }
        tls.observe(&telemetry::get().meter());
    }
    let found = emberline_worker::machine::resources();
    let cpu_millis = match arguments.cpu {
        None => found.cpu_millis,
        Some(cpu) if cpu.is_finite() && (0.001..=1_000_000.0).contains(&cpu) => {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "within the bounds above"
            )]
            let millis = (cpu * 1000.0).round() as u32;
            millis
        }
        Some(cpu) => {
            return Err(Exit::input(format!(
                "`--cpu {cpu}` must be between 0.001 and 1000000"
            )));
        }
    };
    if arguments.memory.is_some_and(|memory| memory.0 == 0) {
        return Err(Exit::input(
            "`--memory 0` leaves nothing to tasks: leave it out, or say how much they may use",
        ));
    }
    let orphan_grace = arguments.orphan_grace;
    if !ORPHAN_GRACE.contains(&orphan_grace.0) {
        return Err(Exit::input(format!(
            "`--orphan-grace {orphan_grace}` must be between {} and {}: with less, each change of the leader would discard what could go on",
            DurationText(*ORPHAN_GRACE.start()),
            DurationText(*ORPHAN_GRACE.end()),
        )));
    }
    Ok(WorkerConfig {
        name,
        leaders,
        dialer: security.dialer.clone(),
        token: security.token.clone(),
        resources: Resources {
            cpu_millis,
            memory_bytes: arguments.memory.map_or(found.memory_bytes, |m| m.0),
            gpus: arguments.gpus.unwrap_or(found.gpus),
        },
        labels,
        slots: arguments.slots,
        state_dir: cluster.state_dir.clone(),
        cache_bytes: cluster.cache_size.0,
        orphan_grace: orphan_grace.0,
        telemetry: telemetry::get(),
        secrets_dir: cluster.stages.secrets_dir.clone(),
        metrics_listen: arguments.metrics_listen.clone(),
        ..WorkerConfig::default()
    })
}

/// Where it serves models, if it does.
fn serve(config: &WorkerConfig, arguments: &WorkerArguments) -> Result<Option<ServeConfig>, Exit> {
    let environment = EnvironmentName::new(&arguments.environment)
        .map_err(|e| Exit::input(format!("`--environment`: {e}")))?;
    let Some(listen) = &arguments.serve else {
        return Ok(None);
    };
    let host = listen.rsplit_once(':').map(|(host, _)| host);
    let host = host.ok_or_else(|| Exit::input(format!("`--serve {listen}` is not `host:port`")))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<IpAddr>().ok();
    if address.is_some_and(|address| address.is_unspecified())
        && arguments.serve_advertise.is_none()
    {
        return Err(Exit::input(format!(
            "`--serve {listen}` is no address that a client can ask: say by `--serve-advertise host:port` where this worker is reached"
        )));
    }
    let is_loopback = address.map_or(host == "localhost", |address| address.is_loopback());
    if !is_loopback && config.dialer.tls().is_none() {
        if !arguments.insecure {
            return Err(Exit::input(format!(
                "`--serve {listen}` lets other machines in, and no certificates are given: give `--tls-ca`, `--tls-cert` and `--tls-key`, use a loopback address, or say `--insecure`"
            )));
        }
        tracing::warn!(%listen, "INSECURE: models are served to whoever can connect");
    }
    Ok(Some(ServeConfig {
        advertise: arguments.serve_advertise.clone(),
        dialer: config.dialer.clone(),
        asks_for_tokens: config.token.is_some(),
        telemetry: config.telemetry.clone(),
        ..ServeConfig::new(listen, environment, config.name.clone())
    }))
}

/// Two workers in one directory would remove each other's work.
fn lock(state_dir: &Path) -> Result<File, Exit> {
    let failed = |what: &str, e: std::io::Error| {
        Exit::cluster(format!("cannot {what} `{}`: {e}", state_dir.display()))
    };
    emberline_worker::machine::private_dir(state_dir)
        .map_err(|e| failed("make the state directory", e))?;
    let path = state_dir.join("worker.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| failed("open the lock in", e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(Exit::cluster(format!(
            "another worker uses the state directory `{}`: give each its own by `--state-dir`",
            state_dir.display()
        ))),
        Err(e) => Err(failed("lock", e.into())),
    }
}

/// The machine's name, as far as it can name a worker.
pub fn machine_name() -> String {
    WorkerConfig::default().name.to_string()
}
