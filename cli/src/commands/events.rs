//! `events`: what happens here is told to others, and what others tell is taken in.

use std::path::PathBuf;

use emberline_common::spec::ByteSize;
use emberline_coordinator::events::{EventsConfig, Outlet, OutletError};

use crate::{
    args::{ClusterArguments, EventsArguments},
    exit::Exit,
};

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
            events: EventsArguments {
                events_file: None,
                events_sink: None,
                events_source: EventsConfig::default().source,
            },
        }
    }
}
