//! `events`: what happens here is told to others, and what others tell is taken in.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use emberline_common::spec::ByteSize;
use emberline_coordinator::events::{EventsConfig, Outlet, OutletError};
use emberline_proto::v1::TakeEventRequest;
use serde_json::{Value, json};

use crate::{
    args::{ClusterArguments, EventsArguments, EventsCommand, Format, StagesArguments},
    client::Cluster,
    exit::Exit,
    output::{self, clean},
    security::SecurityArguments,
};

/// The most that is read from a file, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Does one of them.
pub async fn events(
    arguments: &ClusterArguments,
    command: EventsCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let EventsCommand::Send { file } = command;
    // What is wrong is told before anything is started.
    let events = read(&file)?;
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = send(&cluster, &events, quiet, format).await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

/// The events in a file.
fn read(file: &Path) -> Result<Vec<Value>, Exit> {
    let events = objects(file)?;
    if events.is_empty() {
        return Err(Exit::input(format!("`{}` holds no event", file.display())));
    }
    Ok(events)
}

/// What is in a file (`-` is standard input), one JSON value after the other.
pub fn objects(file: &Path) -> Result<Vec<Value>, Exit> {
    let shown = file.display();
    let unreadable = |e: &dyn std::fmt::Display| Exit::input(format!("cannot read `{shown}`: {e}"));
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin()
            .take(MAX_FILE_BYTES)
            .read_to_string(&mut text),
        false => std::fs::File::open(file)
            .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text)),
    };
    read.map_err(|e| unreadable(&e))?;
    if text.len() as u64 == MAX_FILE_BYTES {
        return Err(unreadable(&"it has more than 64 MiB; send it in parts"));
    }
    let events = serde_json::Deserializer::from_str(&text).into_iter();
    events
        .collect::<Result<_, _>>()
        .map_err(|e| Exit::input(format!("{shown}:{}:{}: no JSON: {e}", e.line(), e.column())))
}

/// Sends them in order, and stops at the first one that is refused.
async fn send(
    cluster: &Cluster,
    events: &[Value],
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let mut told = Vec::new();
    let mut refused = None;
    for (number, event) in (1..).zip(events) {
        let request = TakeEventRequest {
            event_json: event.to_string(),
        };
        let answer = match cluster.dora().take_event(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let mut exit = Exit::from(status);
                for line in &mut exit.lines {
                    *line = format!("event {number}: {line}");
                }
                refused = Some(exit);
                break;
            }
        };
        if format == Format::Text && !quiet {
            output::line(match answer.noted {
                true => format!("event {number}: noted"),
                false => format!("event {number}: not noted, {}", clean(&answer.why)),
            })?;
        }
        told.push(json!({ "noted": answer.noted, "why": answer.why }));
    }
    if format == Format::Json {
        output::json(&told)?;
    }
    refused.map_or(Ok(()), |exit| Err(exit.into()))
}

impl EventsArguments {
    /// Where events go.
    ///
    /// # Errors
    /// If the file cannot be written, or the sink is no web address.
    pub fn config(&self) -> Result<EventsConfig, Exit> {
        let wrong = |e: OutletError| Exit::input(e.to_string());
        let file = self.events_file.as_deref().map(Outlet::file).transpose();
        let sink = self.events_sink.as_deref().map(Outlet::sink).transpose();
        let outlets = [file.map_err(wrong)?, sink.map_err(wrong)?];
        let source = self.events_source.trim();
        if source.is_empty() || source.chars().any(|c| c.is_whitespace() || c.is_control()) {
            let line = format!(
                "`--events-source {}` is no URI reference: write e.g. `/emberline/team-a`",
                self.events_source.escape_debug()
            );
            return Err(Exit::input(line));
        }
        Ok(EventsConfig {
            outlets: outlets.into_iter().flatten().collect(),
            source: source.to_owned(),
        })
    }
}

impl ClusterArguments {
    /// An embedded cluster that tells nobody anything.
    pub fn embedded(state_dir: PathBuf, cache_size: ByteSize) -> Self {
        Self {
            server: None,
            connect_timeout: None,
            state_dir,
            cache_size,
            security: SecurityArguments::default(),
            events: EventsArguments {
                events_file: None,
                events_sink: None,
                events_source: EventsConfig::default().source,
            },
            stages: StagesArguments::default(),
        }
    }
}
