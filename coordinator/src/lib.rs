//! The coordinator: decides what runs where, keeps the state, serves the API.

pub mod engine;
pub mod store;
