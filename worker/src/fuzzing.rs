//! A way in for what feeds this crate with anything; for nobody else.

use emberline_common::serving::ServingPlan;
use emberline_proto::v1::{LeaderMessage, leader_message::Message};

use crate::{kinds::collect::Reach, runner};

/// Translates what a leader says; how much of it can be translated.
#[must_use]
pub fn leader_message(message: LeaderMessage) -> usize {
    match message.message {
        Some(Message::Assignments(assigned)) => {
            let stages = crate::builtin_stages(Reach::default());
            let stages = stages
                .into_iter()
                .map(|stage| (stage.kind(), stage))
                .collect();
            let assigned = assigned.assignments.into_iter();
            assigned
                .filter(|one| runner::can_be_read(&stages, one.clone()))
                .count()
        }
        Some(Message::Serving(plan)) => ServingPlan::try_from(plan).is_ok().into(),
        _ => 0,
    }
}
