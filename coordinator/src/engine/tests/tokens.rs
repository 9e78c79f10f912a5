//! Tokens and credentials: made once, gone together, found by the next leader.

use std::time::Duration;

use emberline_common::{
    access::{Role, Token, TokenHash, TokenKind},
    ids::TokenName,
};

use super::*;
use crate::engine::api::{Decision, Outcome, TokenCommand, TokenRefusal};

fn hash() -> TokenHash {
    let name = TokenName::new("x").unwrap();
    Token::generate(TokenKind::Named(name)).unwrap().hash()
}

fn create(name: &str, role: Role, hash: TokenHash, ttl: Option<Duration>) -> Command {
    Command::Tokens(TokenCommand::Create {
        name: TokenName::new(name).unwrap(),
        role,
        hash,
        ttl,
        made_by: "root".to_owned(),
    })
}

fn issue(worker: &str, joined_by: &str, by_file: bool) -> Command {
    Command::Tokens(TokenCommand::Issue {
        worker: WorkerName::new(worker).unwrap(),
        hash: hash(),
        previous: None,
        joined_by: TokenName::new(joined_by).unwrap(),
        by_file,
        ttl: Duration::from_secs(100),
    })
}

fn revoke(name: &str) -> Command {
    let name = TokenName::new(name).unwrap();
    Command::Tokens(TokenCommand::Revoke { name })
}

fn at(seconds: u64) -> Timestamp {
    Timestamp(1_000_000_000_000 + seconds * 1_000_000)
}

fn engine() -> Engine {
    Engine::new(EngineConfig::default(), Epoch(1), 7)
}

/// The state as the writes leave it.
fn apply(state: &mut BTreeMap<String, Vec<u8>>, decision: &Decision) {
    for write in &decision.writes {
        match write {
            Write::Put { key, value } => drop(state.insert(key.clone(), value.clone())),
            Write::Delete { key } => drop(state.remove(key)),
            Write::DeletePrefix { prefix } => state.retain(|key, _| !key.starts_with(prefix)),
        }
    }
}

#[test]
fn a_token_is_made_once_and_the_same_again_is_no_error() {
    let mut engine = engine();
    let first = hash();
    let made = engine.handle(at(0), create("ci", Role::Operator, first, None));
    assert!(made.outcome.is_ok());
    assert!(matches!(&made.effects[..], [Effect::Access(table)] if table.tokens.len() == 1));
    let again = engine.handle(at(1), create("ci", Role::Operator, first, None));
    assert!(again.outcome.is_ok() && again.writes.is_empty());
    for (role, hash) in [(Role::Admin, first), (Role::Operator, hash())] {
        let other = engine.handle(at(2), create("ci", role, hash, None));
        let refused = Refusal::Tokens(TokenRefusal::Exists(TokenName::new("ci").unwrap()));
        assert_eq!(other.outcome.unwrap_err(), refused);
        assert!(other.writes.is_empty() && other.effects.is_empty());
    }
}

#[test]
fn what_joined_by_a_token_goes_with_it_and_the_next_leader_finds_the_same() {
    let mut engine = engine();
    let mut state = BTreeMap::new();
    for command in [
        create("edge", Role::Worker, hash(), None),
        create("eyes", Role::Viewer, hash(), None),
        issue("e1", "edge", false),
        issue("e2", "edge", false),
        // The same name in the coordinators' file is another token.
        issue("f1", "edge", true),
        issue("g1", "other", false),
    ] {
        let decision = engine.handle(at(0), command);
        assert!(decision.outcome.is_ok());
        apply(&mut state, &decision);
    }
    let decision = engine.handle(at(1), revoke("edge"));
    assert!(matches!(
        decision.outcome,
        Ok(Outcome::Revoked { credentials: 2 })
    ));
    apply(&mut state, &decision);
    assert!(engine.handle(at(1), revoke("edge")).outcome.is_err());
    let left: Vec<_> = engine
        .access()
        .credentials
        .keys()
        .map(WorkerName::as_str)
        .collect();
    assert_eq!(left, ["f1", "g1"]);
    let records: Vec<_> = state.into_iter().collect();
    let none = |_: &RunId, _: &Digest| None;
    let next = Engine::load(EngineConfig::default(), Epoch(2), 8, at(2), records, &none);
    assert_eq!(next.unwrap().0.access(), engine.access());
}

#[test]
fn what_has_expired_makes_room_when_something_is_made() {
    let mut engine = engine();
    let brief = Some(Duration::from_secs(10));
    for command in [
        create("brief", Role::Worker, hash(), brief),
        issue("w1", "brief", false),
    ] {
        assert!(engine.handle(at(0), command).outcome.is_ok());
    }
    // Who joined in time has joined.
    let later = engine.handle(at(20), create("brief", Role::Viewer, hash(), None));
    assert!(later.outcome.is_ok());
    assert_eq!(engine.access().credentials.len(), 1);
    assert!(
        engine
            .handle(at(200), issue("w2", "x", true))
            .outcome
            .is_ok()
    );
    let left: Vec<_> = engine
        .access()
        .credentials
        .keys()
        .map(WorkerName::as_str)
        .collect();
    assert_eq!(left, ["w2"]);
}

#[test]
fn there_is_an_end_to_them() {
    let mut engine = engine();
    for n in 0..1000 {
        let made = engine.handle(at(0), create(&format!("t{n}"), Role::Viewer, hash(), None));
        assert!(made.outcome.is_ok());
    }
    let one_more = engine.handle(at(0), create("more", Role::Viewer, hash(), None));
    assert!(
        one_more
            .outcome
            .unwrap_err()
            .to_string()
            .contains("1000 tokens")
    );
}
