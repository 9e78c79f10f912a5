//! placeholder

/// None yet.
#[must_use]
pub fn stages() -> Vec<std::sync::Arc<dyn emberline_worker::stage::Stage>> {
    Vec::new()
}
