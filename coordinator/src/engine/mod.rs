//! The engine: a pure state machine that decides everything and does nothing.

pub mod api;
