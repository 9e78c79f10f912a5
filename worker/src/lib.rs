//! The worker: runs stages. This crate has the session with the leader, the artifact cache, the
//! [`Stage`](stage::Stage) trait for kinds of your own, and the light kinds.

pub mod documents;
pub mod stage;
pub mod testing;
