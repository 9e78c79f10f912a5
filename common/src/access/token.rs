//! Tokens, and what is kept of them.

use std::{fmt, str::FromStr};

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use thiserror::Error;

use crate::ids::{TokenName, WorkerName};

/// The random part, in bytes.
const SECRET_BYTES: usize = 32;
/// What stands before a token in a header (RFC 6750, section 2.1).
const SCHEME: &str = "Bearer ";
/// No token is longer.
pub const MAX_TOKEN_BYTES: usize = 512;

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKind {
    /// For whoever has it, within its role.
    Named(TokenName),
    /// For one worker that has joined.
    Worker(WorkerName),
}

/// A token in clear. It shows itself to nobody but [`Self::reveal`].
#[derive(Clone)]
pub struct Token {
    kind: TokenKind,
    text: String,
}

/// A text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TokenError {
    /// It is not written like one.
    #[error("this is no token: a token is `emb.NAME.SECRET`")]
    Malformed,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandomness,
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// [`TokenError::NoRandomness`].
    pub fn generate(kind: TokenKind) -> Result<Self, TokenError> {
        let mut secret = [0; SECRET_BYTES];
        getrandom::fill(&mut secret).map_err(|_| TokenError::NoRandomness)?;
        let secret = hex(&secret);
        let text = match &kind {
            TokenKind::Named(name) => format!("emb.{name}.{secret}"),
            TokenKind::Worker(worker) => format!("emw.{worker}.{secret}"),
        };
        Ok(Self { kind, text })
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`TokenError::Malformed`]; it never has anything of the text.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let malformed = || TokenError::Malformed;
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES {
            return Err(malformed());
        }
        let (kind, rest) = text.split_once('.').ok_or_else(malformed)?;
        // A worker's name may have points.
        let (name, secret) = rest.rsplit_once('.').ok_or_else(malformed)?;
        let is_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if secret.len() != SECRET_BYTES * 2 || !secret.bytes().all(is_hex) {
            return Err(malformed());
        }
        let kind = match kind {
            "emb" => TokenName::new(name).map(TokenKind::Named),
            "emw" => WorkerName::new(name).map(TokenKind::Worker),
            _ => return Err(malformed()),
        };
        Ok(Self {
            kind: kind.map_err(|_| malformed())?,
            text: text.to_owned(),
        })
    }

    /// What it is good for.
    #[must_use]
    pub const fn kind(&self) -> &TokenKind {
        &self.kind
    }

    /// The token itself: for the wire, and for whoever is to have it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// As it is shown in the header `authorization`; nobody's log shows it.
    #[must_use]
    pub fn header(&self) -> Option<HeaderValue> {
        // Names and secrets have no character that a header may not have.
        let mut value = HeaderValue::try_from(format!("{SCHEME}{}", self.text)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// The one that a request shows, if what it shows is one.
    #[must_use]
    pub fn shown(headers: &HeaderMap) -> Option<Self> {
        let shown = headers.get(AUTHORIZATION)?.to_str().ok()?;
        Self::parse(shown.strip_prefix(SCHEME)?).ok()
    }

    /// What is kept of it.
    #[must_use]
    pub fn hash(&self) -> TokenHash {
        TokenHash(Sha256::digest(self.text.as_bytes()).into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:?})", self.kind)
    }
}

/// The SHA-256 of a token. Two are compared in constant time.
#[derive(Clone, Copy)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// What no token has: to compare with where there is no token of a name, so that it takes as
    /// long.
    pub const NOBODY: Self = Self([0; 32]);
}

impl PartialEq for TokenHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenHash {}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex(&self.0))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenHash {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "the hash of a token is `sha256:` and 64 digits from 0 to f";
        let digits = text.strip_prefix("sha256:").ok_or(WRONG)?;
        if digits.len() != 64 || !digits.is_ascii() {
            return Err(WRONG);
        }
        let mut hash = [0; 32];
        for (at, byte) in hash.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).map_err(|_| WRONG)?;
        }
        Ok(Self(hash))
    }
}

impl Serialize for TokenHash {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenHash {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(D::Error::custom)
    }
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn named(name: &str) -> TokenKind {
        TokenKind::Named(TokenName::new(name).unwrap())
    }

    #[test]
    fn a_token_is_read_back_and_tells_nothing_of_itself() {
        let worker = TokenKind::Worker(WorkerName::new("edge-1").unwrap());
        for kind in [named("ci"), worker] {
            let token = Token::generate(kind.clone()).unwrap();
            let read = Token::parse(&format!("{}\n", token.reveal())).unwrap();
            assert_eq!(read.kind(), &kind);
            assert_eq!(read.hash(), token.hash());
            let secret = token.reveal().rsplit('.').next().unwrap();
            assert!(!format!("{token:?}").contains(secret));
            assert!(!token.hash().to_string().contains(secret));
            assert_ne!(Token::generate(kind).unwrap().hash(), token.hash());
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let secret = "0".repeat(64);
        for text in [
            String::new(),
            "emb".into(),
            "emb.ci".into(),
            format!("emb.ci.{}", "0".repeat(63)),
            format!("emb.ci.{}", "G".repeat(64)),
            format!("emb..{secret}"),
            format!("emb.CI.{secret}"),
            format!("emb.a.b.{secret}"),
            format!("abc.ci.{secret}"),
            format!("emb.{}.{secret}", "a".repeat(600)),
        ] {
            assert!(Token::parse(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_hash_is_written_and_read() {
        let hash = Token::generate(named("a")).unwrap().hash();
        assert_eq!(hash.to_string().parse::<TokenHash>().unwrap(), hash);
        assert_ne!(hash, TokenHash::NOBODY);
        for wrong in ["", "sha256:", "sha256:00", &"sha256:é".repeat(40)] {
            assert!(wrong.parse::<TokenHash>().is_err());
        }
    }
}
