//! Who may ask: whoever shows a token that the leader's plan allows. What says no more than whether the
//! server is there and ready is answered to everybody.

use emberline_common::{
    access::{Token, TokenHash, TokenKind},
    serving::AllowedToken,
    time::Timestamp,
};
use http::{HeaderMap, HeaderValue, header};

/// Who may ask, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Everybody.
    #[default]
    Open,
    /// No leader has said it yet: nobody.
    Unknown,
    /// Whoever has one of these.
    Tokens(Vec<AllowedToken>),
}

/// The same text whatever is wrong.
pub(crate) const NEEDED: &str = "a valid token is needed: send it as `authorization: Bearer …`";

impl Admission {
    /// What a plan says.
    pub fn of(access: Option<Vec<AllowedToken>>) -> Self {
        access.map_or(Self::Open, Self::Tokens)
    }

    /// Whether a request with these headers is to be answered.
    pub fn allows(&self, headers: &HeaderMap, now: Timestamp) -> bool {
        let tokens = match self {
            Self::Open => return true,
            Self::Unknown => return false,
            Self::Tokens(tokens) => tokens,
        };
        let Some(token) = Token::shown(headers) else {
            return false;
        };
        let TokenKind::Named(name) = token.kind() else {
            return false;
        };
        let known = tokens.iter().find(|known| known.name == *name);
        let hash = known.map_or(TokenHash::NOBODY, |known| known.hash);
        let is_same = token.hash() == hash;
        is_same && known.is_some_and(|known| known.expires_at.is_none_or(|until| now < until))
    }
}

/// What a request shows.
pub(crate) fn shown(headers: &HeaderMap) -> Option<&HeaderValue> {
    headers.get(header::AUTHORIZATION)
}

/// Whether a path is answered to everybody: is it there, is it ready, what is it?
pub(crate) fn is_public(path: &str) -> bool {
    matches!(
        path,
        "/v2"
            | "/v2/health/live"
            | "/v2/health/ready"
            | "/inference.GRPCInferenceService/ServerLive"
            | "/inference.GRPCInferenceService/ServerReady"
            | "/inference.GRPCInferenceService/ServerMetadata"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn token(name: &str) -> Token {
        Token::generate(TokenKind::Named(name.parse().unwrap())).unwrap()
    }

    fn showing(text: &str) -> HeaderMap {
        let value = HeaderValue::try_from(text).unwrap();
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    }

    #[test]
    fn who_shows_what_the_plan_allows_may_ask() {
        let (now, until) = (Timestamp(10), Timestamp(20));
        let (eyes, other) = (token("eyes"), token("eyes"));
        let allowed = AllowedToken {
            name: "eyes".parse().unwrap(),
            hash: eyes.hash(),
            expires_at: Some(until),
        };
        let admission = Admission::of(Some(vec![allowed]));
        let bearer = |token: &Token| showing(&format!("Bearer {}", token.reveal()));
        assert!(admission.allows(&bearer(&eyes), now));
        assert!(!admission.allows(&bearer(&eyes), until));
        assert!(!admission.allows(&bearer(&other), now));
        assert!(!admission.allows(&bearer(&token("nobody")), now));
        assert!(!admission.allows(&showing(eyes.reveal()), now));
        assert!(!admission.allows(&HeaderMap::new(), now));
        assert!(!Admission::Unknown.allows(&bearer(&eyes), now));
        assert!(Admission::of(None).allows(&HeaderMap::new(), now));
        assert!(!Admission::of(Some(Vec::new())).allows(&HeaderMap::new(), now));
    }
}
