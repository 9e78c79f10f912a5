//! The light stage kinds: those that need neither columnar data nor training.

pub mod collect;
pub mod deploy;
pub mod exec;
pub mod noop;

use std::sync::Arc;

use crate::stage::Stage;

/// `collect` within that reach, `deploy`, `exec` and `noop`.
#[must_use]
pub fn builtin_stages(reach: collect::Reach) -> Vec<Arc<dyn Stage>> {
    vec![
        Arc::new(collect::Collect::within(reach)),
        Arc::new(deploy::Deploy),
        Arc::new(exec::Exec),
        Arc::new(noop::Noop),
    ]
}

#[allow(clippy::expect_used, reason = "the built-in kinds' names are names")]
fn kind(kind: emberline_common::spec::kinds::BuiltinKind) -> emberline_common::ids::StageKind {
    emberline_common::ids::StageKind::new(kind.as_str()).expect("a kind's name")
}

#[allow(
    clippy::expect_used,
    reason = "only called with constants that are names"
)]
fn output(name: &'static str) -> emberline_common::ids::ArtifactName {
    emberline_common::ids::ArtifactName::new(name).expect("an artifact's name")
}
