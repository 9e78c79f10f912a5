//! What this process logs and exports: set up once, before anything else, and ended last.

use std::{
    io::{self, IsTerminal as _},
    sync::{LazyLock, OnceLock},
    time::Duration,
};

use emberline_common::telemetry::{LogLayer, Setup, Telemetry};
use emberline_coordinator::traces::Spans;
use tracing_subscriber::{
    EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use crate::{
    args::{Command, LogFormat, RunsCommand},
    exit::Exit,
    log_fields::fields,
    output::colours,
};

/// How long what is left may take to be exported at the end.
const END_WITHIN: Duration = Duration::from_secs(2);

static LAYER: LazyLock<LogLayer> = LazyLock::new(LogLayer::default);
static TELEMETRY: OnceLock<Telemetry> = OnceLock::new();

/// Logs go to standard error; quiet unless asked (`-v`, `-vv`, `RUST_LOG`).
pub fn init_logs(verbose: u8, format: LogFormat) {
    let default = match verbose {
        0 => "warn",
        1 => "info,emberline=info,object_store=warn",
        _ => "info,emberline_coordinator=debug,emberline_worker=debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let lines = tracing_subscriber::fmt::layer();
    let lines = match format {
        LogFormat::Text => lines
            .with_writer(io::stderr)
            .fmt_fields(fields())
            .with_ansi(colours(io::stderr().is_terminal()))
            .boxed(),
        LogFormat::Json => lines
            .with_writer(io::stderr)
            .json()
            .flatten_event(true)
            .with_ansi(false)
            .boxed(),
    };
    let registry = tracing_subscriber::registry().with(filter);
    registry.with(lines).with(LAYER.clone()).init();
}

/// Begins to export, if the process does work that is worth watching and the environment says where
/// to. To be called within the runtime.
///
/// # Errors
/// If the environment says something that cannot be meant.
pub fn start(command: &Command) -> Result<(), Exit> {
    let service = match command {
        Command::Coordinator(_) => "emberline-coordinator",
        Command::Worker(_) => "emberline-worker",
        // Those of which the embedded cluster may do something for others to see.
        Command::Run(_) | Command::Dev { .. } | Command::Rollback(_) => "emberline",
        Command::Runs(RunsCommand::Retry { .. } | RunsCommand::Watch { .. }) => "emberline",
        _ => return Ok(()),
    };
    let instance = match command {
        Command::Coordinator(how) => how.name.clone(),
        Command::Worker(how) => how.name.clone(),
        _ => None,
    };
    let setup = Setup {
        service,
        instance: instance.unwrap_or_else(crate::commands::machine_name),
    };
    let telemetry = Telemetry::start(&setup).map_err(|e| Exit::input(e.to_string()))?;
    LAYER.connect(&telemetry);
    // It is started once.
    let _ = TELEMETRY.set(telemetry);
    Ok(())
}

/// The way out of this process; nothing leaves by it unless [`start`] was called.
pub fn get() -> Telemetry {
    TELEMETRY.get().cloned().unwrap_or_default()
}

/// What the coordinator's spans are made with: `EMBERLINE_RUN_URL` says where a run can be looked
/// at, with `{run}`.
pub fn spans() -> Spans {
    let template = std::env::var("EMBERLINE_RUN_URL").ok();
    let template = template.filter(|template| template.contains("{run}"));
    template.map_or_else(Spans::default, Spans::new)
}

/// Where a trace can be looked at, if `EMBERLINE_TRACE_URL` says so: with `{trace_id}` in it.
pub fn trace_url() -> Option<String> {
    let template = std::env::var("EMBERLINE_TRACE_URL").ok();
    template.filter(|template| template.contains("{trace_id}"))
}

/// Exports what is left.
pub async fn end() {
    get().shutdown(END_WITHIN).await;
}
