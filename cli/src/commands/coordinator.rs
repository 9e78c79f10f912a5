//! `coordinator`: one of a cluster's coordinators, until it is told to stop.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use emberline_common::{
    access::read_tokens,
    address::is_host_port,
    artifact::{ArtifactStore, StoreFault},
    reload::Reloaded,
    spec::DurationText,
};
use emberline_coordinator::{
    Audit, Coordinator, CoordinatorConfig, Gate,
    engine::api::EngineConfig,
    store::{
        StateStore, StoreError,
        etcd::{EtcdConfig, EtcdStore, EtcdTls},
    },
};
use tokio::{
    net::{TcpListener, lookup_host},
    signal::unix::{SignalKind, signal},
};

use crate::{
    args::{ClusterArguments, CoordinatorArguments, EtcdArguments},
    exit::Exit,
    output,
    security::Security,
    telemetry,
};

/// Assignments of one decision, so that a commit fits into one of etcd's transactions.
const ASSIGNMENTS_AT_ONCE: usize = 48;

/// Serves until SIGTERM, Ctrl-C or a failure.
pub async fn coordinator(
    arguments: CoordinatorArguments,
    cluster: &ClusterArguments,
    quiet: bool,
) -> anyhow::Result<()> {
    let times = Times::of(&arguments)?;
    let events = cluster.events.config()?;
    let listen = address(&arguments.listen).await?;
    let security = cluster.security.read()?;
    let gate = gate(&arguments)?;
    check_exposure(&arguments, listen, &security, &gate)?;
    if listen.ip().is_unspecified() && arguments.advertise.is_none() {
        return Err(Exit::input(format!(
            "`--listen {}` is every address of this machine: say by `--advertise host:port` where others reach it",
            arguments.listen
        ))
        .into());
    }
    if let Some(advertise) = &arguments.advertise
        && !is_host_port(advertise)
    {
        return Err(Exit::input(format!("`--advertise {advertise}` is not `host:port`")).into());
    }
    let name = match &arguments.name {
        Some(name) if name.is_empty() || name.len() > 100 => {
            return Err(Exit::input("`--name` must have 1 to 100 characters").into());
        }
        Some(name) => name.clone(),
        None => super::worker::machine_name(),
    };
    // Before anything is started, so that it is never missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let artifacts =
        ArtifactStore::open(&arguments.artifacts).map_err(|e| Exit::input(e.to_string()))?;
    if let Err(e) = artifacts.probe_write().await {
        // What passes by itself is waited for, attempt by attempt; what somebody must put right is not.
        if !e.store_fault().is_some_and(StoreFault::is_passing) {
            return Err(Exit::input(e.to_string()).into());
        }
        eprintln!(
            "waiting for the object store: {}",
            output::clean(&e.to_string())
        );
    }
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|e| Exit::cluster(format!("cannot serve on {listen}: {e}")))?;
    let store = Arc::new(
        EtcdStore::open(etcd(
            &arguments.etcd,
            &arguments.etcd_access,
            times.lease_ttl,
            arguments.etcd_compact_every.0,
        )?)
        .await
        .map_err(told)?,
    );
    if let Some(trouble) = store.trouble() {
        eprintln!("waiting for etcd: {}", output::clean(&trouble.text));
    }
    let config = CoordinatorConfig {
        name: name.clone(),
        store,
        artifacts,
        engine: EngineConfig {
            worker_grace: times.worker_grace,
            closed_grace: times.closed_grace,
            adoption_window: times.adoption_window,
            assignments_at_once: ASSIGNMENTS_AT_ONCE,
            ..EngineConfig::default()
        },
        heartbeat_interval: times.heartbeat_interval,
        advertise: arguments.advertise.clone(),
        telemetry: telemetry::get(),
        spans: telemetry::spans(),
        trace_url: telemetry::trace_url(),
        events,
        one_of_many: true,
        dialer: security.dialer,
        gate,
    };
    let coordinator = Coordinator::start(config, listener)
        .await
        .map_err(|e| Exit::cluster(e.to_string()))?;
    if !quiet {
        let address = coordinator.address();
        output::line(format!("coordinator {name} serves on {address}"))?;
    }
    let failed = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        stopped = coordinator.stopped() => stopped.err(),
    };
    let stopped = coordinator.shutdown().await;
    match failed.map_or(stopped, Err) {
        Ok(()) => Ok(()),
        Err(e) => Err(Exit::cluster(format!("the coordinator stopped: {e}")).into()),
    }
}

/// Other machines are let in with certificates and tokens, or by saying so.
fn check_exposure(
    arguments: &CoordinatorArguments,
    listen: SocketAddr,
    security: &Security,
    gate: &Gate,
) -> Result<(), Exit> {
    if let Some(tls) = security.dialer.tls() {
        tls.can_serve()
            .map_err(|e| Exit::input(format!("{e}: give them by `--tls-cert` and `--tls-key`")))?;
        tls.observe(&telemetry::get().meter());
    }
    let missing = match (security.dialer.tls().is_some(), gate.is_closed()) {
        (true, true) => return Ok(()),
        _ if listen.ip().is_loopback() => return Ok(()),
        (false, false) => "neither certificates nor tokens are given",
        (false, true) => "no certificates are given, so that tokens could be read on the way",
        (true, false) => "no tokens are given",
    };
    if !arguments.insecure {
        return Err(Exit::input(format!(
            "`--listen {}` lets other machines in, and {missing}: give `--tls-ca`, `--tls-cert`, `--tls-key` and `--tokens-file`, use a loopback address, or say `--insecure`",
            arguments.listen
        )));
    }
    tracing::warn!(%listen, "INSECURE: {missing}; whoever reaches this address can run commands on the workers");
    Ok(())
}

/// Who may call, and where it is noted.
fn gate(arguments: &CoordinatorArguments) -> Result<Gate, Exit> {
    let gate = match arguments.tokens_file.clone() {
        None => Gate::default(),
        Some(path) => {
            let read = {
                let path = path.clone();
                move || read_tokens(&path)
            };
            let tokens = Reloaded::open("tokens", vec![path], read);
            Gate::closed(tokens.map_err(|e| Exit::input(format!("`--tokens-file`: {e}")))?)
        }
    };
    let audit = arguments.audit_log.as_deref().map(|path| {
        Audit::open(path).map_err(|e| {
            Exit::input(format!(
                "cannot write the audit log `{}`: {e}",
                path.display()
            ))
        })
    });
    Ok(gate.with_audit(audit.transpose()?))
}

fn told(e: StoreError) -> Exit {
    match e {
        StoreError::Config(line) => Exit::input(line),
        e => Exit::cluster(e.to_string()),
    }
}

async fn address(listen: &str) -> Result<SocketAddr, Exit> {
    let wrong = |why: String| {
        Exit::input(format!(
            "`--listen {listen}` is no address: {why}; write e.g. `127.0.0.1:7420`"
        ))
    };
    let mut found = lookup_host(listen)
        .await
        .map_err(|e| wrong(e.to_string()))?;
    found
        .next()
        .ok_or_else(|| wrong("it names no machine".into()))
}

/// How to reach and use etcd.
pub(super) fn etcd(
    endpoints: &[String],
    access: &EtcdArguments,
    lease_ttl: Duration,
    compact_every: Duration,
) -> Result<EtcdConfig, Exit> {
    let user = match (&access.etcd_user, &access.etcd_password_file) {
        (Some(user), Some(file)) => {
            let password = std::fs::read_to_string(file)
                .map_err(|e| Exit::input(format!("cannot read `{}`: {e}", file.display())))?;
            Some((
                user.clone(),
                password.trim_end_matches(['\r', '\n']).to_owned(),
            ))
        }
        _ => None,
    };
    let tls = EtcdTls::read(
        access.etcd_ca.clone(),
        access.etcd_cert.clone(),
        access.etcd_key.clone(),
    );
    Ok(EtcdConfig {
        endpoints: endpoints.to_vec(),
        prefix: access.etcd_prefix.clone(),
        user,
        tls: tls.map_err(told)?,
        lease_ttl,
        compact_every: (!compact_every.is_zero()).then_some(compact_every),
    })
}

/// The times, each within its bounds and right beside the others.
struct Times {
    lease_ttl: Duration,
    worker_grace: Duration,
    closed_grace: Duration,
    adoption_window: Duration,
    heartbeat_interval: Duration,
}

impl Times {
    fn of(arguments: &CoordinatorArguments) -> Result<Self, Exit> {
        let within = |field: &str, text: DurationText, least: Duration, most: Duration| {
            let value = text.0;
            if value < least || value > most {
                return Err(Exit::input(format!(
                    "`--{field} {text}` must be between {} and {}",
                    DurationText(least),
                    DurationText(most)
                )));
            }
            Ok(value)
        };
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let times = Self {
            lease_ttl: within("lease-ttl", arguments.lease_ttl, s(2), s(60))?,
            worker_grace: within("worker-grace", arguments.worker_grace, ms(100), s(3600))?,
            closed_grace: within("closed-grace", arguments.closed_grace, ms(0), s(3600))?,
            adoption_window: within(
                "adoption-window",
                arguments.adoption_window,
                ms(100),
                s(600),
            )?,
            heartbeat_interval: within(
                "heartbeat-interval",
                arguments.heartbeat_interval,
                ms(50),
                s(60),
            )?,
        };
        if times.lease_ttl.subsec_nanos() != 0 {
            return Err(Exit::input(format!(
                "`--lease-ttl {}` must be whole seconds: etcd counts in them",
                arguments.lease_ttl
            )));
        }
        // A worker looks for the next leader at once, but it takes until its session is known to be
        // broken; and that, where nothing closes it, takes until the heartbeats are missed.
        if times.worker_grace < times.heartbeat_interval * 2 {
            return Err(Exit::input(format!(
                "`--worker-grace {}` is shorter than two of `--heartbeat-interval {}`: a single late heartbeat would lose a worker",
                arguments.worker_grace, arguments.heartbeat_interval
            )));
        }
        if times.closed_grace > times.worker_grace {
            return Err(Exit::input(format!(
                "`--closed-grace {}` is longer than `--worker-grace {}`: what is surely broken would be waited for longer than what is only silent",
                arguments.closed_grace, arguments.worker_grace
            )));
        }
        if times.adoption_window < times.heartbeat_interval {
            return Err(Exit::input(format!(
                "`--adoption-window {}` is shorter than `--heartbeat-interval {}`: a new leader would give up on attempts that workers still run",
                arguments.adoption_window, arguments.heartbeat_interval
            )));
        }
        Ok(times)
    }
}
