//! Aliases, tags, notes, imports and deletions: what is taken, and what is in service.

use emberline_common::{
    delivery::{Change, ChangeKind, DeploymentOutcome},
    ids::DeploymentId,
    run_view::{CodeRevision, Imported, ModelRegistration, ModelVersion, Origin},
};

use super::{
    deployments::{ask, deploy, deploy_to, roll_back},
    *,
};
use crate::engine::api::{
    ImportedVersion, Outcome as Answer, Refusal, RegistryCommand, RegistryRefusal, VersionRef,
    VersionView,
};

fn change(cluster: &mut Cluster, command: RegistryCommand) -> Result<VersionView, String> {
    let before = cluster.state.clone();
    match ask(cluster, Command::Registry(command)) {
        Ok(Answer::Version(version)) => Ok(*version),
        Ok(other) => panic!("another answer: {other:?}"),
        Err(refusal) => {
            assert!(cluster.state == before, "a refusal writes nothing");
            Err(refusal.to_string())
        }
    }
}

fn bundle(content: &str, alias: Option<&str>) -> ImportedVersion {
    ImportedVersion {
        registration: ModelRegistration {
            model: "m".parse().unwrap(),
            alias: alias.map(|alias| alias.parse().unwrap()),
            artifact: ArtifactRef {
                name: "model".parse().unwrap(),
                manifest: Digest::of(content.as_bytes()),
                bytes: 10,
            },
            metrics: Map::new(),
            schema: Value::Null,
            notes: String::new(),
        },
        expected: None,
        imported: Imported {
            model: "theirs".parse().unwrap(),
            version: 7,
            created_at: Timestamp(5),
            made_by: None,
        },
        lineage: [("raw/data".to_owned(), Digest::of(b"data"))].into(),
        code: None,
        tags: BTreeMap::new(),
    }
}

fn import(cluster: &mut Cluster, content: &str, alias: Option<&str>) -> Result<u32, String> {
    let command = RegistryCommand::Import(Box::new(bundle(content, alias)));
    change(cluster, command).map(|view| view.version.version)
}

fn alias(
    cluster: &mut Cluster,
    alias: &str,
    to: Option<&str>,
    expected: Option<u32>,
) -> Result<u32, String> {
    let command = RegistryCommand::Alias {
        model: "m".parse().unwrap(),
        alias: alias.parse().unwrap(),
        to: to.map(|to| to.parse().unwrap()),
        expected,
    };
    change(cluster, command).map(|view| view.version.version)
}

fn annotate(
    cluster: &mut Cluster,
    set: &[(&str, &str)],
    remove: &[&str],
    notes: Option<&str>,
) -> Result<VersionView, String> {
    let set = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let command = RegistryCommand::Annotate {
        model: "m".parse().unwrap(),
        version: VersionRef::Number(1),
        set: set.collect(),
        remove: remove.iter().map(|key| (*key).to_owned()).collect(),
        notes: notes.map(str::to_owned),
    };
    change(cluster, command)
}

fn delete(cluster: &mut Cluster, version: &str) -> Result<u32, String> {
    let command = RegistryCommand::Delete {
        model: "m".parse().unwrap(),
        version: version.parse().unwrap(),
    };
    change(cluster, command).map(|view| view.version.version)
}

fn version(cluster: &Cluster, number: u32) -> ModelVersion {
    let model = "m".parse().unwrap();
    let found = cluster.engine.model_version(&model, number);
    found.expect("the version is there").clone()
}

/// The registry as the next leader has it.
fn numbers(cluster: &Cluster) -> (u32, Vec<u32>, Vec<(String, u32)>) {
    let model = "m".parse().unwrap();
    let (view, versions) = cluster.next_leader().model(&model).unwrap();
    assert_eq!(
        Some((view.clone(), versions.clone())),
        cluster.engine.model(&model)
    );
    let aliases = view.aliases.iter().map(|(a, v)| (a.to_string(), *v));
    let versions = versions.iter().map(|v| v.version.version);
    (view.latest_version, versions.collect(), aliases.collect())
}

#[test]
fn of_two_who_expect_the_same_one_moves_the_alias() {
    let mut cluster = Cluster::new();
    for content in ["a", "b", "c"] {
        import(&mut cluster, content, None).unwrap();
    }
    assert_eq!(alias(&mut cluster, "champion", Some("1"), Some(0)), Ok(1));
    assert_eq!(alias(&mut cluster, "champion", Some("2"), Some(1)), Ok(2));
    let told = alias(&mut cluster, "champion", Some("3"), Some(1)).unwrap_err();
    let line = "the alias `champion` of `m` names version 2, not 1 as was expected";
    assert_eq!(told, line);
    let told = alias(&mut cluster, "champion", Some("3"), Some(0)).unwrap_err();
    assert!(told.ends_with("names version 2, but was expected not to be set"));
    let told = alias(&mut cluster, "challenger", Some("3"), Some(2)).unwrap_err();
    assert!(
        told.ends_with("is not set, not 2 as was expected"),
        "{told}"
    );
    // Whoever expects nothing moves it in any case; a version can be named by an alias.
    assert_eq!(
        alias(&mut cluster, "challenger", Some("champion"), None),
        Ok(2)
    );
    let expected = vec![("challenger".to_owned(), 2), ("champion".to_owned(), 2)];
    assert_eq!(numbers(&cluster), (3, vec![3, 2, 1], expected));
}

#[test]
fn a_move_that_is_asked_for_again_is_no_mistake() {
    // Its answer may have been lost with the leader that gave it.
    let mut cluster = Cluster::new();
    import(&mut cluster, "a", None).unwrap();
    for _ in 0..2 {
        assert_eq!(alias(&mut cluster, "champion", Some("1"), Some(0)), Ok(1));
    }
    for _ in 0..2 {
        let mut given = bundle("b", Some("champion"));
        given.expected = Some(1);
        let view = change(&mut cluster, RegistryCommand::Import(Box::new(given)));
        assert_eq!(view.unwrap().version.version, 2);
    }
}

#[test]
fn an_alias_is_taken_away_only_from_what_was_expected() {
    let mut cluster = Cluster::new();
    import(&mut cluster, "a", Some("champion")).unwrap();
    let told = alias(&mut cluster, "champion", None, Some(2)).unwrap_err();
    assert!(
        told.ends_with("names version 1, not 2 as was expected"),
        "{told}"
    );
    assert_eq!(alias(&mut cluster, "champion", None, Some(1)), Ok(1));
    let told = alias(&mut cluster, "champion", None, None).unwrap_err();
    assert_eq!(told, "the model `m` has no version `champion`");
    assert_eq!(numbers(&cluster), (1, vec![1], vec![]));
}

#[test]
fn aliases_that_are_none_are_refused() {
    let mut cluster = Cluster::new();
    let told = alias(&mut cluster, "champion", Some("1"), None).unwrap_err();
    assert_eq!(told, "there is no model `m`");
    import(&mut cluster, "a", None).unwrap();
    let told = alias(&mut cluster, "champion", Some("2"), None).unwrap_err();
    assert_eq!(told, "the model `m` has no version `2`");
    let told = alias(&mut cluster, "1", Some("1"), None).unwrap_err();
    assert_eq!(told, "`1` would be taken for a version's number");
    for number in 0..crate::engine::registry::MAX_ALIASES {
        alias(&mut cluster, &format!("a{number}"), Some("1"), None).unwrap();
    }
    let told = alias(&mut cluster, "more", Some("1"), None).unwrap_err();
    assert_eq!(told, "`m` has 256 aliases already");
}

#[test]
fn a_version_is_told_by_its_number_or_by_an_alias() {
    let number = |text: &str| text.parse::<VersionRef>();
    assert_eq!(number("17"), Ok(VersionRef::Number(17)));
    assert_eq!(number("v1"), Ok(VersionRef::Alias("v1".parse().unwrap())));
    for bad in ["0", "4294967296", "", "A", "a b", "-1"] {
        assert!(number(bad).is_err(), "{bad}");
    }
}

#[test]
fn tags_and_notes_change_and_nothing_else() {
    let mut cluster = Cluster::new();
    import(&mut cluster, "a", None).unwrap();
    let before = version(&cluster, 1);
    annotate(
        &mut cluster,
        &[("team", "vision"), ("old", "")],
        &[],
        Some("first\nline"),
    )
    .unwrap();
    let view = annotate(&mut cluster, &[("stage", "b")], &["old", "none"], None).unwrap();
    let tags: Vec<_> = view.version.tags.iter().collect();
    assert_eq!(
        format!("{tags:?}"),
        r#"[("stage", "b"), ("team", "vision")]"#
    );
    assert_eq!(view.version.registration.notes, "first\nline");
    let mut after = view.version;
    after.tags.clear();
    after.registration.notes.clear();
    assert_eq!(after, before);
    numbers(&cluster);

    let long = "x".repeat(4097);
    for (set, notes, part) in [
        (vec![("", "v")], None, "the key of a tag is empty"),
        (
            vec![("k", "a\nb")],
            None,
            "the value of tag `k` has control characters",
        ),
        (
            vec![],
            Some(long.as_str()),
            "they have 4097 bytes, at most 4096",
        ),
        (vec![], Some("\u{1b}[31m"), "they have control characters"),
    ] {
        let told = annotate(&mut cluster, &set, &[], notes).unwrap_err();
        assert!(told.contains(part), "{told}");
    }
    let many: Vec<String> = (0..65).map(|n| n.to_string()).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|key| (key.as_str(), "")).collect();
    let told = annotate(&mut cluster, &many, &[], None).unwrap_err();
    assert!(told.contains("at most 64 are allowed"), "{told}");
}

#[test]
fn the_same_artifact_is_the_same_version_and_moves_the_alias() {
    let mut cluster = Cluster::new();
    assert_eq!(import(&mut cluster, "a", None), Ok(1));
    let before = version(&cluster, 1);
    assert_eq!(import(&mut cluster, "b", Some("champion")), Ok(2));
    assert_eq!(import(&mut cluster, "a", Some("champion")), Ok(1));
    assert_eq!(version(&cluster, 1), before);
    let expected = vec![("champion".to_owned(), 1)];
    assert_eq!(numbers(&cluster), (2, vec![2, 1], expected));
    let Origin::Bundle { imported } = before.origin else {
        panic!("it was imported");
    };
    assert_eq!((imported.model.as_str(), imported.version), ("theirs", 7));
}

#[test]
fn an_import_whose_alias_has_moved_registers_nothing() {
    let mut cluster = Cluster::new();
    import(&mut cluster, "a", Some("champion")).unwrap();
    let mut given = bundle("b", Some("champion"));
    given.expected = Some(0);
    let told = change(&mut cluster, RegistryCommand::Import(Box::new(given)));
    assert!(told.unwrap_err().contains("names version 1"));
    assert_eq!(numbers(&cluster).0, 1);
}

#[test]
fn what_is_in_service_is_not_deleted() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    deploy(&mut cluster, "b");
    let told = delete(&mut cluster, "2").unwrap_err();
    assert!(
        told.starts_with("version 2 of `m` is live in `production`: "),
        "{told}"
    );
    alias(&mut cluster, "old", Some("1"), None).unwrap();
    let told = delete(&mut cluster, "old").unwrap_err();
    assert!(
        told.starts_with("version 1 of `m` is named by the alias `old`: "),
        "{told}"
    );
    alias(&mut cluster, "old", None, None).unwrap();
    let first = DeploymentId(1);
    (cluster.engine).change_deployment(first, |d| d.outcome = DeploymentOutcome::InProgress);
    cluster.handle(Command::Tick);
    let told = delete(&mut cluster, "1").unwrap_err();
    assert!(
        told.starts_with("version 1 of `m` is becoming live by `d1`: "),
        "{told}"
    );
    (cluster.engine).change_deployment(first, |d| d.outcome = DeploymentOutcome::Live);
    assert_eq!(delete(&mut cluster, "1"), Ok(1));
    assert_eq!(
        delete(&mut cluster, "1").unwrap_err(),
        "the model `m` has no version `1`"
    );
    assert_eq!(numbers(&cluster).1, [2]);
}

#[test]
fn a_deleted_versions_number_is_never_given_again() {
    let mut cluster = Cluster::new();
    import(&mut cluster, "a", None).unwrap();
    import(&mut cluster, "b", None).unwrap();
    delete(&mut cluster, "2").unwrap();
    delete(&mut cluster, "1").unwrap();
    assert_eq!(numbers(&cluster), (2, vec![], vec![]));
    let roots = cluster.engine.referenced_manifests().count();
    assert_eq!(roots, 0, "nothing keeps its artifact");
    cluster.engine = cluster.next_leader();
    assert_eq!(import(&mut cluster, "b", None), Ok(3));
}

#[test]
fn a_rollback_goes_back_to_a_version_that_there_is() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    for content in ["a", "b", "c"] {
        deploy(&mut cluster, content);
    }
    delete(&mut cluster, "2").unwrap();
    let Ok(Answer::Deployment { deployment, .. }) = roll_back(&mut cluster) else {
        panic!("there is a way back");
    };
    assert_eq!(deployment.version, 1);
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    deploy(&mut cluster, "a");
    deploy(&mut cluster, "b");
    delete(&mut cluster, "1").unwrap();
    let none = roll_back(&mut cluster);
    assert!(matches!(none, Err(Refusal::WrongDeployment(_))), "{none:?}");
}

#[test]
fn a_version_remembers_what_it_came_after_and_its_code() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.change = Some(Change {
        kind: ChangeKind::Code,
        repository: "https://example.org/r".to_owned(),
        revision: "abc".to_owned(),
        branch: String::new(),
        id: String::new(),
        committed_at: Timestamp(1),
        authored_at: None,
        pushed_at: None,
        dirty: false,
        commits: Vec::new(),
        left_out: 0,
    });
    deploy(&mut cluster, "a");
    let staging = json!({"model": "m", "alias": "champion", "environment": "staging"});
    deploy_to(&mut cluster, "b", staging.clone());
    deploy(&mut cluster, "c");
    deploy_to(&mut cluster, "d", staging);
    import(&mut cluster, "e", Some("champion")).unwrap();
    import(&mut cluster, "f", None).unwrap();
    let parents = (1..=6).map(|number| version(&cluster, number).parent);
    // The first of staging came after what the alias named; `c` and `d` after what was live there.
    let expected = [None, Some(1), Some(1), Some(2), Some(4), None];
    assert!(parents.eq(expected));
    let code = CodeRevision {
        repository: "https://example.org/r".to_owned(),
        revision: "abc".to_owned(),
        dirty: false,
    };
    assert_eq!(version(&cluster, 1).code, Some(code));
}

#[test]
fn records_of_earlier_builds_are_read() {
    let mut cluster = Cluster::new();
    let digest = Digest::of(b"x").to_string();
    let head = json!({"latest": 1, "aliases": {"champion": 1}});
    let old = json!({
        "model": "m", "alias": "champion",
        "artifact": {"name": "model", "manifest": digest, "bytes": 3},
        "metrics": {"f1": 0.5}, "schema": [], "notes": "n", "version": 1, "run": "r1",
        "task": "deploy", "pipeline": "p", "pipeline_revision": digest,
        "lineage": {"raw/data": digest}, "created_at": 4,
    });
    let put = |key: &str, value: &Value| Write::Put {
        key: key.to_owned(),
        value: serde_json::to_vec(value).unwrap(),
    };
    cluster.apply(vec![put("models/m", &head), put("models/m/00000001", &old)]);
    cluster.engine = cluster.next_leader();
    let loaded = version(&cluster, 1);
    assert_eq!((loaded.parent, loaded.code.clone()), (None, None));
    assert_eq!(loaded.origin.made_by().unwrap().run.as_str(), "r1");
    // What it writes is what such a build would read.
    assert_eq!(serde_json::to_value(&loaded).unwrap(), old);
}

#[test]
fn a_record_that_would_be_too_large_is_refused() {
    let mut cluster = Cluster::new();
    let mut given = bundle("a", None);
    given.registration.schema = Value::from("x".repeat(64 << 10));
    let told = change(&mut cluster, RegistryCommand::Import(Box::new(given)));
    assert!(told.unwrap_err().contains("at most 65536 are kept"));
    let mut given = bundle("a", None);
    given.registration.schema = Value::from("x".repeat((64 << 10) - 1000));
    change(&mut cluster, RegistryCommand::Import(Box::new(given))).unwrap();
    let command = RegistryCommand::Annotate {
        model: "m".parse().unwrap(),
        version: VersionRef::Number(1),
        set: BTreeMap::new(),
        remove: Vec::new(),
        notes: Some("n".repeat(2000)),
    };
    let refused = ask(&mut cluster, Command::Registry(command));
    let field = match refused {
        Err(Refusal::Registry(RegistryRefusal::Invalid { field, .. })) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field, "notes");
}
