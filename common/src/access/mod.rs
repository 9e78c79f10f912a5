//! Who may do what: roles, tokens, and the file of tokens that are valid from the start.
//!
//! A token is `emb.NAME.SECRET`; whoever has it may do what its role may. What is kept of it is its
//! SHA-256 ([`TokenHash`]): the secret has 256 random bits, so that nothing slower is needed. A
//! worker that has joined by a token is given a credential of its own, `emw.WORKER.SECRET`, which is
//! of use to no other worker.

mod file;
mod token;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

pub use self::{
    file::{StaticToken, TokensFileError, read_tokens, tokens_line},
    token::{MAX_TOKEN_BYTES, Token, TokenError, TokenHash, TokenKind},
};

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// To look at everything.
    Viewer,
    /// Also to run pipelines, and to change models and what is live.
    Operator,
    /// Everything a person can do, tokens included.
    Admin,
    /// To be a worker, and nothing else.
    Worker,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Operator, Self::Admin, Self::Worker];

    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
            Self::Worker => "worker",
        }
    }

    /// Whether whoever has this role may do what needs the other one.
    #[must_use]
    pub const fn allows(self, needed: Self) -> bool {
        match needed {
            Self::Worker => matches!(self, Self::Worker),
            Self::Viewer => matches!(self, Self::Viewer | Self::Operator | Self::Admin),
            Self::Operator => matches!(self, Self::Operator | Self::Admin),
            Self::Admin => matches!(self, Self::Admin),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let role = Self::ALL.into_iter().find(|role| role.as_str() == text);
        role.ok_or_else(|| {
            format!(
                "`{}` is no role: there are viewer, operator, admin and worker",
                text.escape_debug()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Role::{Admin, Operator, Viewer, Worker};

    #[test]
    fn a_role_allows_what_lesser_ones_do_and_a_worker_is_no_person() {
        for (role, allowed) in [
            (Viewer, &[Viewer][..]),
            (Operator, &[Viewer, Operator]),
            (Admin, &[Viewer, Operator, Admin]),
            (Worker, &[Worker]),
        ] {
            for needed in super::Role::ALL {
                assert_eq!(
                    role.allows(needed),
                    allowed.contains(&needed),
                    "{role} {needed}"
                );
            }
        }
    }
}
