//! Containers, by a real Docker Engine: the images, and a whole cluster of `deploy/compose.yaml`, as a user
//! has them.
//!
//! [`Engine`] is the engine, and `docker` on it; [`Project`] the cluster. Where no engine answers, one is
//! started that keeps everything in `$EMBERLINE_TOOLS/containers`, and it is gone when the test is over.
//! Nothing of a test is left: containers, networks and volumes are removed at the end, and what a
//! killed test left is removed at the beginning of the next one.

mod engine;
mod project;

pub use engine::Engine;
pub use project::{Project, Rest};
