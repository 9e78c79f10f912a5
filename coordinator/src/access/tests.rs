//! Who is let in, and to what.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::*;
use crate::engine::api::{CredentialRecord, TokenRecord};

const NOW: Timestamp = Timestamp(1_000_000_000);

fn token(name: &str) -> (Token, TokenName) {
    let name = TokenName::new(name).unwrap();
    let kind = TokenKind::Named(name.clone());
    (Token::generate(kind).unwrap(), name)
}

fn credential(worker: &str) -> (Token, WorkerName) {
    let worker = WorkerName::new(worker).unwrap();
    let kind = TokenKind::Worker(worker.clone());
    (Token::generate(kind).unwrap(), worker)
}

fn record(token: &Token, role: Role, expires_at: Option<Timestamp>) -> TokenRecord {
    TokenRecord {
        role,
        hash: token.hash(),
        created_at: Timestamp(0),
        expires_at,
        made_by: "root".to_owned(),
    }
}

fn role_of(known: Option<Known>) -> Option<Role> {
    match known {
        Some(Known::Token { role, .. }) => Some(role),
        Some(Known::Worker { .. }) => Some(Role::Worker),
        Some(Known::Anyone) | None => None,
    }
}

#[test]
fn a_token_is_known_by_all_of_it_and_while_it_is_valid() {
    let (ci, name) = token("ci");
    let (file, in_file) = token("root");
    let tokens = [StaticToken {
        name: in_file,
        role: Role::Admin,
        hash: file.hash(),
    }];
    let mut table = AccessTable::default();
    let until = NOW.after(Duration::from_secs(1));
    let made = record(&ci, Role::Operator, Some(until));
    table.tokens.insert(name, made);
    let role = |token: &Token, now| role_of(known(&tokens, &table, token, now));
    assert_eq!(role(&ci, NOW), Some(Role::Operator));
    assert_eq!(role(&ci, until), None, "it has expired");
    assert_eq!(role(&file, NOW), Some(Role::Admin));
    for name in ["ci", "root", "nobody"] {
        assert_eq!(role(&token(name).0, NOW), None, "another secret");
    }
    assert_eq!(role(&credential("ci").0, NOW), None);
}

#[test]
fn a_token_of_the_file_goes_before_one_of_its_name() {
    let (file, name) = token("root");
    let (made, _) = token("root");
    let tokens = [StaticToken {
        name: name.clone(),
        role: Role::Viewer,
        hash: file.hash(),
    }];
    let mut table = AccessTable::default();
    let admin = record(&made, Role::Admin, None);
    table.tokens.insert(name, admin);
    assert_eq!(role_of(known(&tokens, &table, &made, NOW)), None);
    assert_eq!(
        role_of(known(&tokens, &table, &file, NOW)),
        Some(Role::Viewer)
    );
}

#[test]
fn a_credential_is_one_workers_and_goes_with_the_file_that_let_it_in() {
    let (joined, join) = token("join");
    let (shown, worker) = credential("w1");
    let mut table = AccessTable::default();
    let record = CredentialRecord {
        hash: shown.hash(),
        previous: None,
        joined_by: join.clone(),
        by_file: true,
        issued_at: Timestamp(0),
        expires_at: NOW.after(Duration::from_secs(1)),
    };
    table.credentials.insert(worker.clone(), record);
    let file = [StaticToken {
        name: join,
        role: Role::Worker,
        hash: joined.hash(),
    }];
    let caller = |by| Caller { by, identity: None };
    let by = known(&file, &table, &shown, NOW).unwrap();
    caller(by.clone()).may(Role::Worker).unwrap();
    caller(by.clone()).may_be(&worker).unwrap();
    let other = WorkerName::new("w2").unwrap();
    assert!(caller(by.clone()).may_be(&other).is_err());
    for needed in [Role::Viewer, Role::Operator, Role::Admin] {
        assert!(caller(by.clone()).may(needed).is_err());
    }
    assert_eq!(known(&[], &table, &shown, NOW), None);
    assert_eq!(known(&file, &table, &credential("w1").0, NOW), None);
    let later = NOW.after(Duration::from_secs(2));
    assert_eq!(known(&file, &table, &shown, later), None);
    // The next one may not have reached the worker: the one that it shows stays good.
    let (next, _) = credential("w1");
    let record = table.credentials.get_mut(&worker).unwrap();
    (record.hash, record.previous) = (next.hash(), Some(shown.hash()));
    assert!(known(&file, &table, &shown, NOW).is_some());
    assert!(known(&file, &table, &next, NOW).is_some());
}

#[test]
fn a_certificate_keeps_its_owner_to_what_it_is() {
    let caller = |role, name: &str| Caller {
        by: Known::Anyone,
        identity: Some(Identity {
            role,
            name: name.to_owned(),
        }),
    };
    let may = |role, needed| caller(role, "x").may(needed).is_ok();
    for (role, person, work) in [
        (CertificateRole::Coordinator, true, true),
        (CertificateRole::Client, true, false),
        (CertificateRole::Worker, false, true),
        (CertificateRole::Workers, false, true),
        (CertificateRole::Server, false, false),
    ] {
        assert_eq!(may(role, Role::Admin), person, "{role:?}");
        assert_eq!(may(role, Role::Viewer), person, "{role:?}");
        assert_eq!(may(role, Role::Worker), work, "{role:?}");
    }
    let (w1, w2) = ("w1".parse().unwrap(), "w2".parse().unwrap());
    assert!(caller(CertificateRole::Worker, "w1").may_be(&w1).is_ok());
    assert!(caller(CertificateRole::Worker, "w1").may_be(&w2).is_err());
    assert!(caller(CertificateRole::Workers, "gpu").may_be(&w2).is_ok());
}
