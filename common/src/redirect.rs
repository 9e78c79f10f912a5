//! Where the leader is, as a follower's answer says it.
//!
//! A follower answers every call with the code `UNAVAILABLE` and, in the details, an `ErrorInfo` with
//! the reason [`REASON`] and, while somebody leads, the leader's address and term as metadata.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{address::is_host_port, ids::Epoch};

/// The domain of every `ErrorInfo` that Emberline sends.
pub const DOMAIN: &str = "emberline";
/// The reason of a follower's answer.
pub const REASON: &str = "NOT_LEADER";
const LEADER: &str = "leader";
const EPOCH: &str = "epoch";

/// What a follower's answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// The leader's address, `host:port`; `None` while nobody leads.
    pub leader: Option<String>,
    /// The leader's term; 0 if it was not said.
    pub epoch: Epoch,
}

/// A follower's answer.
#[must_use]
pub fn not_leader(
    leader: Option<(&str, Epoch)>,
    message: String,
    retry_after: std::time::Duration,
) -> Status {
    let metadata = leader.map_or_else(HashMap::new, |(address, epoch)| {
        HashMap::from([
            (LEADER.to_owned(), address.to_owned()),
            (EPOCH.to_owned(), epoch.to_string()),
        ])
    });
    let mut details = ErrorDetails::new();
    details.set_error_info(REASON, DOMAIN, metadata);
    details.set_retry_info(Some(retry_after));
    Status::with_error_details(Code::Unavailable, message, details)
}

/// What a status says of the leader, if it is a follower's answer. An address that is none is left out:
/// it was made by a peer.
#[must_use]
pub fn redirect(status: &Status) -> Option<Redirect> {
    if status.code() != Code::Unavailable {
        return None;
    }
    let info = status.get_details_error_info()?;
    if info.reason != REASON || info.domain != DOMAIN {
        return None;
    }
    let leader = info.metadata.get(LEADER).filter(|a| is_host_port(a));
    let epoch = info.metadata.get(EPOCH).and_then(|e| e.parse().ok());
    Some(Redirect {
        leader: leader.cloned(),
        epoch: Epoch(epoch.unwrap_or_default()),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn status(leader: Option<(&str, Epoch)>) -> Status {
        not_leader(leader, "not here".to_owned(), Duration::from_millis(200))
    }

    #[test]
    fn a_followers_answer_says_where_the_leader_is() {
        let said = redirect(&status(Some(("10.0.0.1:7420", Epoch(7)))));
        let expected = Redirect {
            leader: Some("10.0.0.1:7420".to_owned()),
            epoch: Epoch(7),
        };
        assert_eq!(said, Some(expected));
    }

    #[test]
    fn it_may_not_know_one() {
        let said = redirect(&status(None)).map(|said| said.leader);
        assert_eq!(said, Some(None));
    }

    #[test]
    fn what_is_no_address_is_left_out() {
        for address in ["", "x", "a b:1", "u@h:1", "h:99999", "h:1/x"] {
            let said = redirect(&status(Some((address, Epoch(1))))).map(|said| said.leader);
            assert_eq!(said, Some(None), "{address}");
        }
    }

    #[test]
    fn other_answers_are_none() {
        assert_eq!(redirect(&Status::unavailable("busy")), None);
        assert_eq!(redirect(&Status::internal("broken")), None);
    }
}
