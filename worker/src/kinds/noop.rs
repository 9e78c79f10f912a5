//! `noop`: does nothing. A join, a barrier, a measure of the system itself.

use emberline_common::{ids::StageKind, spec::kinds::BuiltinKind};

use crate::stage::{Stage, StageContext, StageError, StageOutput};

/// The kind `noop`.
pub struct Noop;

impl Stage for Noop {
    fn kind(&self) -> StageKind {
        super::kind(BuiltinKind::Noop)
    }
    fn version(&self) -> u32 {
        BuiltinKind::Noop.version()
    }
    fn does_nothing(&self) -> bool {
        true
    }
    fn run(&self, _: &StageContext) -> Result<StageOutput, StageError> {
        Ok(StageOutput::default())
    }
}
