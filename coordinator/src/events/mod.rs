//! CDEvents: what happens here is told to others, and what others tell is noted.
//!
//! Out: each place that events go to has a teller of its own ([`out`]). It tells what it observes as
//! it happens, best effort; and it goes through the engine's records of what is still untold until
//! all of that was taken: at least once, with ids that a repeat shares. A place that is dead holds
//! up nothing but its own teller, and memory stays bounded: the records wait in the state.
//!
//! In: [`heard`] reads an event of others and says what the engine is to note of it.

mod event;
mod heard;
mod out;
mod outlets;
mod records;

pub use event::{Event, EventId, Kind, SPEC_VERSION};
pub use heard::{EventError, Heard, MAX_EVENT_BYTES, heard};
pub use outlets::{Outlet, OutletError};

pub(crate) use out::Tellers;

/// Where events go, and what they say of who tells them.
#[derive(Debug, Clone)]
pub struct EventsConfig {
    /// The places; each gets every event.
    pub outlets: Vec<Outlet>,
    /// The events' `source`: a URI reference that names this cluster.
    pub source: String,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            outlets: Vec::new(),
            source: "/emberline".to_owned(),
        }
    }
}
