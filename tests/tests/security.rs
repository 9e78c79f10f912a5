//! Certificates and tokens on real processes: what is let in does its work while leaders die, and
//! whatever is not is turned away with one line that tells nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use emberline_common::tls::{Dialer, Tls, TlsFiles, install_crypto_provider};
use emberline_tests::{
    Output, Place, Secured, cluster::PREFIX, processes, seconds, secured::identity, wait_for,
};
use rcgen::{CertificateParams, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The run that was submitted.
#[track_caller]
fn run_of(submitted: Output) -> String {
    let submitted = submitted.expect_code(0).json();
    submitted["run"].as_str().unwrap().to_owned()
}

/// Whether a text stands in any file below a directory.
fn stands_below(dir: &Path, text: &str) -> bool {
    let found = |path: &Path| {
        let bytes = fs::read(path).unwrap_or_default();
        let text = text.as_bytes();
        bytes.windows(text.len()).any(|window| window == text)
    };
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries.into_iter().any(|path| {
        if path.is_dir() {
            stands_below(&path, text)
        } else {
            found(&path)
        }
    })
}

#[test]
fn a_cluster_of_certificates_and_tokens_does_its_work_and_survives_its_leader() {
    let mut cluster = Secured::start();
    let mut worker = cluster.worker("w0", "w0", "join");
    worker.start();
    cluster.wait_for_worker("w0", true);
    cluster.succeeds(&run_of(cluster.submit("hands")));

    // From here on it lives by its own credential.
    let credential = cluster.place.path("nodes/w0/state/credential");
    wait_for("a credential", seconds(20), || {
        credential.exists().then_some(())
    });
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader].kill();
    cluster.wait_for_worker("w0", true);
    cluster.succeeds(&run_of(cluster.submit("hands")));
    worker.kill();
    fs::remove_file(cluster.place.path("join.token")).unwrap();
    fs::copy(
        cluster.place.path("eyes.token"),
        cluster.place.path("join.token"),
    )
    .unwrap();
    worker.start();
    cluster.wait_for_worker("w0", true);
    cluster.succeeds(&run_of(cluster.submit("root")));

    let noted = cluster.audit();
    let submits: Vec<_> = noted
        .iter()
        .filter(|e| e["call"] == "RunService/SubmitRun")
        .collect();
    assert_eq!(submits.len(), 3, "{noted:#?}");
    for (entry, who) in submits.iter().zip(["hands", "hands", "root"]) {
        assert_eq!(
            (&entry["who"], &entry["outcome"]),
            (&who.into(), &"ok".into()),
            "{entry:#}"
        );
        assert_eq!(entry["certificate"], "client/admin", "{entry:#}");
        assert!(entry["on"].as_str().unwrap().len() > 4, "{entry:#}");
    }
    assert!(
        noted
            .iter()
            .any(|e| e["call"] == "WorkerService/Session" && e["who"] == "join")
    );

    // No secret is anywhere but where it was put.
    for name in ["root", "hands", "eyes"] {
        let token = cluster.token(name);
        let secret = token.rsplit('.').next().unwrap();
        for dir in ["nodes", "objects", "journal"] {
            assert!(
                !stands_below(&cluster.place.path(dir), secret),
                "{name} in {dir}"
            );
        }
        for audit in ["c0.audit", "c1.audit", "hashes"] {
            let text = fs::read_to_string(cluster.place.path(audit)).unwrap();
            assert!(!text.contains(secret), "{name} in {audit}");
        }
        for key in cluster.etcd.keys(PREFIX).unwrap() {
            let value = cluster.etcd.get(&key).unwrap();
            assert!(
                !String::from_utf8_lossy(value.value()).contains(secret),
                "{name} in {key}"
            );
        }
    }
    let credential = fs::read_to_string(&credential).unwrap();
    let secret = credential.trim().rsplit('.').next().unwrap();
    for key in cluster.etcd.keys(PREFIX).unwrap() {
        let value = cluster.etcd.get(&key).unwrap();
        assert!(
            !String::from_utf8_lossy(value.value()).contains(secret),
            "{key}"
        );
    }
}

#[test]
fn a_token_allows_what_its_role_does_and_no_more() {
    let cluster = Secured::start();
    let list: &[&str] = &["runs", "list"];
    let submit: &[&str] = &["submit", "one.yaml"];
    let tokens: &[&str] = &["tokens", "list"];
    cluster
        .place
        .write("one.yaml", cluster.journal.chains(1, 1));
    for (token, allowed, refused) in [
        ("eyes", &[list][..], &[submit, tokens][..]),
        ("hands", &[list, submit], &[tokens]),
        ("root", &[list, submit, tokens], &[]),
        ("join", &[], &[list, submit, tokens]),
    ] {
        for arguments in allowed {
            let _ = cluster.call(token, arguments).run().expect_code(0);
        }
        for arguments in refused {
            let refused = cluster.call(token, arguments).run().expect_code(2);
            assert!(refused.stderr.contains("role"), "{token}: {refused}");
            assert_eq!(refused.errors().len(), 1, "{refused}");
        }
    }
    // Whatever is wrong with a token, the answer is the same.
    let known = cluster.token("root");
    let (name, secret) = known.rsplit_once('.').unwrap();
    let other: String = secret.chars().rev().collect();
    let mut answers = Vec::new();
    for shown in [format!("{name}.{other}"), format!("emb.nobody.{secret}")] {
        let path = cluster.place.write("shown.token", &shown);
        answers.push(
            cluster
                .call("root", list)
                .env("EMBERLINE_TOKEN_FILE", path)
                .run(),
        );
    }
    let certificates = identity(&cluster.place, "admin");
    answers.push(cluster.bare(list).envs(&certificates).run());
    for answer in &answers {
        assert_eq!(answer.code, Some(2), "{answer}");
        assert_eq!(answer.stderr, answers[0].stderr, "{answer}");
        assert!(
            answer.stderr.contains("a valid token is needed"),
            "{answer}"
        );
    }
    let denied = |e: &&serde_json::Value| e["outcome"] == "permission_denied";
    assert_eq!(cluster.audit().iter().filter(denied).count(), 6);
}

#[test]
fn tokens_are_made_listed_and_revoked() {
    let cluster = Secured::start();
    let create = [
        "tokens", "create", "ci", "--role", "operator", "--file", "ci.token",
    ];
    cluster.call("root", &create).run().expect_code(0);
    cluster.call("ci", &["runs", "list"]).run().expect_code(0);
    let again = ["tokens", "create", "ci", "--role", "viewer"];
    let again = cluster.call("root", &again).run().expect_code(2);
    assert!(again.stderr.contains("another token `ci`"), "{again}");
    let in_file = ["tokens", "create", "eyes", "--role", "viewer"];
    let in_file = cluster.call("root", &in_file).run().expect_code(2);
    assert!(in_file.stderr.contains("file has a token"), "{in_file}");
    let brief = [
        "tokens",
        "create",
        "brief",
        "--role",
        "viewer",
        "--ttl",
        "1s",
        "--file",
        "brief.token",
    ];
    cluster.call("root", &brief).run().expect_code(0);
    wait_for("the token's end", seconds(20), || {
        (cluster.call("brief", &["runs", "list"]).run().code == Some(2)).then_some(())
    });
    let listed = cluster
        .call("root", &["tokens", "list", "-o", "json"])
        .run();
    let listed = listed.expect_code(0).json();
    let names: Vec<_> = listed["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["name"].clone())
        .collect();
    assert!(
        ["ci", "eyes", "root"]
            .iter()
            .all(|name| names.contains(&(*name).into())),
        "{listed:#}"
    );

    // A worker that joined by a token goes with it.
    let join = [
        "tokens",
        "create",
        "edge",
        "--role",
        "worker",
        "--file",
        "edge.token",
    ];
    cluster.call("root", &join).run().expect_code(0);
    let mut worker = cluster.worker("e1", "fleet", "edge");
    worker.start();
    cluster.wait_for_worker("e1", true);
    let revoked = cluster
        .call("root", &["tokens", "revoke", "edge"])
        .run()
        .expect_code(0);
    assert!(revoked.stdout.contains("1 worker"), "{revoked}");
    cluster.wait_for_worker("e1", false);
    cluster
        .call("root", &["tokens", "revoke", "ci"])
        .run()
        .expect_code(0);
    let gone = cluster.call("ci", &["runs", "list"]).run().expect_code(2);
    assert!(gone.stderr.contains("a valid token is needed"), "{gone}");
    let nobody = cluster
        .call("root", &["tokens", "revoke", "nobody"])
        .run()
        .expect_code(2);
    assert!(nobody.stderr.contains("no token `nobody`"), "{nobody}");
    assert!(worker.runs(), "it keeps trying");
}

#[test]
fn a_watch_ends_when_its_token_is_revoked() {
    let cluster = Secured::start();
    let create = [
        "tokens",
        "create",
        "looks",
        "--role",
        "viewer",
        "--file",
        "looks.token",
    ];
    cluster.call("root", &create).run().expect_code(0);
    // No worker has that, so that the run goes on for as long as the test does.
    cluster.place.write(
        "waits.yaml",
        "pipeline: waits\nstages:\n  a: { kind: noop, labels: { on: the-moon } }\n",
    );
    let submit = ["run", "waits.yaml", "--detach"];
    let run = cluster.call("root", &submit).run().expect_code(0);
    let run = run.stdout.trim().to_owned();
    let watches: Vec<_> = [
        ["runs", "watch", &run].as_slice(),
        ["runs", "logs", &run, "--task", "a", "--follow"].as_slice(),
    ]
    .map(|arguments| cluster.call("looks", arguments).start())
    .into();
    wait_for("the watch shows the run", seconds(20), || {
        (watches[0].stderr() + &watches[0].stdout())
            .contains("waits")
            .then_some(())
    });
    let revoke = ["tokens", "revoke", "looks"];
    cluster.call("root", &revoke).run().expect_code(0);
    for watch in watches {
        let ended = watch.finish().expect_code(2);
        assert!(ended.stderr.contains("a valid token is needed"), "{ended}");
    }
}

#[test]
fn a_worker_is_who_its_certificate_and_its_credential_say() {
    let cluster = Secured::start();
    // The certificate of w0, under another name.
    let mut other = cluster.worker("w9", "w0", "join");
    other.start();
    says(&other, "not that of worker `w9`");
    let refused = |e: &&serde_json::Value| e["on"] == "w9" && e["outcome"] == "permission_denied";
    let audit = cluster.audit();
    let entry = audit.iter().find(refused).unwrap();
    assert_eq!(entry["call"], "WorkerService/Session");
    // A client's certificate does no work, a worker's does nothing else.
    let mut client = cluster.worker("w8", "admin", "join");
    client.start();
    says(&client, "client/admin");
    let listed = cluster.call("root", &["runs", "list"]);
    let listed = listed
        .envs(&identity(&cluster.place, "w0"))
        .run()
        .expect_code(2);
    assert!(listed.stderr.contains("worker/w0"), "{listed}");
    // The credential of one, on the disk of another.
    let mut first = cluster.worker("f1", "fleet", "join");
    first.start();
    cluster.wait_for_worker("f1", true);
    let credential = cluster.place.path("nodes/f1/state/credential");
    wait_for("a credential", seconds(20), || {
        credential.exists().then_some(())
    });
    let stolen = cluster.place.path("stolen.token");
    fs::copy(&credential, &stolen).unwrap();
    let mut second = cluster.worker("f2", "fleet", "stolen");
    second.start();
    says(
        &second,
        "the token is that of worker `f1`, not that of `f2`",
    );
    assert_eq!(cluster.workers(), ["f1"]);
}

#[test]
fn who_shows_no_certificate_of_the_authority_is_not_let_in() {
    let cluster = Secured::start();
    let place = &cluster.place;
    let other = [
        "certs",
        "make",
        "other",
        "--coordinator",
        "c0",
        "--client",
        "admin",
    ];
    place.emberline(&other).run().expect_code(0);
    let ours = |what: &str| place.path(&format!("certs/admin/{what}.pem"));
    let theirs = |what: &str| place.path(&format!("other/admin/{what}.pem"));
    let token = place.path("root.token");
    let with = |variables: &[(&str, std::path::PathBuf)]| {
        let mut call = cluster
            .bare(&["runs", "list"])
            .env("EMBERLINE_TOKEN_FILE", &token);
        for (name, path) in variables {
            call = call.env(name, path);
        }
        let refused = call.run().expect_code(3);
        let errors = refused
            .stderr
            .lines()
            .filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{refused}");
        refused
    };
    const CA: &str = "EMBERLINE_TLS_CA";
    const CERT: &str = "EMBERLINE_TLS_CERT";
    const KEY: &str = "EMBERLINE_TLS_KEY";
    // In clear; without a certificate; with one that somebody else has signed; believing somebody else.
    // The port's refusal may be overtaken by the end of the connection, which says less.
    wait_for("what may be missing", seconds(60), || {
        with(&[]).stderr.contains("it may speak TLS").then_some(())
    });
    // How that shows depends on which comes first, the alert or our own request.
    with(&[(CA, ours("ca"))]);
    with(&[
        (CA, ours("ca")),
        (CERT, theirs("cert")),
        (KEY, theirs("key")),
    ]);
    let told = with(&[(CA, theirs("ca")), (CERT, ours("cert")), (KEY, ours("key"))]);
    assert!(told.stderr.contains("UnknownIssuer"), "{told}");
    // Halves.
    for variables in [
        &[(CA, ours("ca")), (CERT, ours("cert"))][..],
        &[(CERT, ours("cert")), (KEY, ours("key"))],
        &[(CA, ours("ca")), (CERT, ours("cert")), (KEY, theirs("key"))],
        &[
            (CA, place.path("nowhere")),
            (CERT, ours("cert")),
            (KEY, ours("key")),
        ],
        &[
            (CA, token.clone()),
            (CERT, ours("cert")),
            (KEY, ours("key")),
        ],
        &[(CA, ours("ca")), (CERT, ours("cert")), (KEY, ours("cert"))],
    ] {
        let mut call = cluster.bare(&["runs", "list"]);
        for (name, path) in variables {
            call = call.env(name, path);
        }
        let refused = call.run().expect_code(2);
        assert_eq!(refused.errors().len(), 1, "{refused}");
        assert!(!refused.stderr.contains("BEGIN"), "{refused}");
    }
    // Nothing of it has harmed those who are let in.
    let _ = cluster.wait_for_leader();
}

#[test]
fn renewed_and_revoked_certificates_are_taken_up_without_a_restart() {
    let mut cluster = Secured::start();
    let _ = cluster.wait_for_leader();
    let shown = |cluster: &Secured| {
        let shown = cluster.place.json(&["certs", "show", "certs"]);
        let shown = shown.as_array().unwrap().iter();
        shown
            .map(|c| (c["name"].clone(), c["state"].clone()))
            .collect::<Vec<_>>()
    };
    assert!(shown(&cluster).iter().all(|(_, state)| state == "valid"));
    // A new authority: everything is made anew, and the old certificates are worth nothing.
    fs::rename(cluster.place.path("certs"), cluster.place.path("old")).unwrap();
    let make = [
        "certs",
        "make",
        "certs",
        "--coordinator",
        "c0",
        "--coordinator",
        "c1",
        "--workers",
        "fleet",
        "--client",
        "admin",
    ];
    cluster.place.emberline(&make).run().expect_code(0);
    let _ = cluster.wait_for_leader();
    let old = |what: &str| cluster.place.path(&format!("old/admin/{what}.pem"));
    let before = cluster.call("root", &["runs", "list"]);
    let before = before
        .env("EMBERLINE_TLS_CA", old("ca"))
        .env("EMBERLINE_TLS_CERT", old("cert"));
    before
        .env("EMBERLINE_TLS_KEY", old("key"))
        .run()
        .expect_code(3);
    // What is there and valid stays.
    let again = cluster.place.emberline(&make).run().expect_code(0);
    assert_eq!(again.stdout, "");

    // A list of revoked ones, which coordinators are told of at their start and read again later.
    let crl = cluster.place.path("certs/crl.pem");
    let revoke = ["certs", "revoke", "certs", "c0"];
    cluster.place.emberline(&revoke).run().expect_code(0);
    let variable = ("EMBERLINE_TLS_CRL".to_owned(), crl.display().to_string());
    let nodes = std::mem::take(&mut cluster.coordinators);
    let with_list = |node: emberline_tests::node::Node| {
        let mut node = node.with_environment(std::slice::from_ref(&variable));
        node.kill();
        node.start();
        node
    };
    cluster.coordinators = nodes.into_iter().map(with_list).collect();
    let _ = cluster.wait_for_leader();
    let revoke = ["certs", "revoke", "certs", "admin"];
    cluster.place.emberline(&revoke).run().expect_code(0);
    let states = shown(&cluster);
    assert!(
        states.contains(&("admin".into(), "revoked".into())),
        "{states:?}"
    );
    wait_for("the revocation", seconds(30), || {
        let refused = cluster.call("root", &["runs", "list"]).run();
        (refused.code == Some(3)).then_some(())
    });
}

/// Asks over HTTP/1.1 on TLS with the administrator's certificate; gives the status.
fn ask(cluster: &Secured, address: &str, path: &str, token: Option<&str>) -> u16 {
    let files = |what: &str| cluster.place.path(&format!("certs/admin/{what}.pem"));
    install_crypto_provider();
    let files = TlsFiles {
        ca: files("ca"),
        identity: Some((files("cert"), files("key"))),
        revoked: None,
    };
    let dialer = Dialer::new(Some(Tls::open(files).unwrap()));
    let shown = token.map_or_else(String::new, |t| format!("authorization: Bearer {t}\r\n"));
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n{shown}connection: close\r\n\r\n");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let mut stream = dialer.open(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // The other end may close without a farewell.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    });
    answer
        .split(' ')
        .nth(1)
        .unwrap_or_default()
        .parse()
        .unwrap()
}

#[test]
fn served_models_are_asked_with_a_token() {
    let cluster = Secured::start();
    let serve = format!("127.0.0.1:{}", processes::free_port());
    let mut worker = cluster.worker_with("w0", "w0", "join", &["--serve", &serve]);
    worker.start();
    cluster.wait_for_worker("w0", true);
    let eyes = cluster.token("eyes");
    let index = "/v2/models/nothing";
    // Nobody may ask before a leader has said who may.
    wait_for("the plan", seconds(20), || {
        (ask(&cluster, &serve, index, Some(&eyes)) == 404).then_some(())
    });
    assert_eq!(ask(&cluster, &serve, index, None), 401);
    assert_eq!(
        ask(&cluster, &serve, index, Some(&cluster.token("join"))),
        401
    );
    assert_eq!(ask(&cluster, &serve, "/v2/health/live", None), 200);
    // One that is made later, and one that is revoked.
    let create = [
        "tokens",
        "create",
        "asks",
        "--role",
        "viewer",
        "--file",
        "asks.token",
    ];
    cluster.call("root", &create).run().expect_code(0);
    let asks = cluster.token("asks");
    wait_for("the new token", seconds(20), || {
        (ask(&cluster, &serve, index, Some(&asks)) == 404).then_some(())
    });
    cluster
        .call("root", &["tokens", "revoke", "asks"])
        .run()
        .expect_code(0);
    wait_for("the revocation", seconds(20), || {
        (ask(&cluster, &serve, index, Some(&asks)) == 401).then_some(())
    });
    assert_eq!(ask(&cluster, &serve, index, Some(&eyes)), 404);
}

#[test]
fn certificates_of_another_time_or_host_and_older_protocols_are_refused() {
    let cluster = Secured::start();
    let place = &cluster.place;
    let read = |path: &str| fs::read_to_string(place.path(path)).unwrap();
    let key = KeyPair::from_pem(&read("certs/ca-key.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("certs/ca.pem"), key).unwrap();
    let day = std::time::Duration::from_hours(24);
    let now = std::time::SystemTime::now();
    // Signed by the authority, with these times.
    let make = |name: &str, from: std::time::SystemTime, until: std::time::SystemTime| {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (from.into(), until.into());
        let pair = KeyPair::generate().unwrap();
        let signed = params.signed_by(&pair, &issuer).unwrap();
        fs::create_dir(place.path(&format!("certs/{name}"))).unwrap();
        place.write(&format!("certs/{name}/cert.pem"), signed.pem());
        place.write(&format!("certs/{name}/key.pem"), pair.serialize_pem());
        place.write(&format!("certs/{name}/ca.pem"), read("certs/ca.pem"));
    };
    make("past", now - day * 2, now - day);
    make("future", now + day, now + day * 2);
    make("plain", now - day, now + day);
    let list = |name: &str| {
        let call = cluster.bare(&["runs", "list"]).envs(&identity(place, name));
        call.env("EMBERLINE_TOKEN_FILE", place.path("root.token"))
            .run()
    };
    list("plain").expect_code(0);
    for name in ["past", "future"] {
        list(name).expect_code(3);
    }
    // A server with a certificate for another host.
    let listen = format!("127.0.0.2:{}", processes::free_port());
    let artifacts = format!("file://{}", place.path("objects").display());
    let urls = cluster.etcd.urls().join(",");
    let hashes = place.path("hashes");
    let arguments = [
        "coordinator",
        "--name",
        "c2",
        "--listen",
        &listen,
        "--etcd",
        &urls,
        "--etcd-prefix",
        PREFIX,
        "--artifacts",
        &artifacts,
        "--tokens-file",
        hashes.to_str().unwrap(),
    ];
    let other = place
        .emberline(&arguments)
        .envs(&identity(place, "c0"))
        .start();
    wait_for("the start", seconds(20), || {
        other.stdout().contains("serves on").then_some(())
    });
    let call = place.emberline(&["--server", &listen, "runs", "list"]);
    let refused = call.envs(&identity(place, "admin")).run().expect_code(3);
    assert!(refused.stderr.contains("not valid for name"), "{refused}");
    drop(other);
    // TLS 1.2 is not spoken.
    let address = cluster.servers().split(',').next().unwrap().to_owned();
    let file = |what: &str| place.path(&format!("certs/admin/{what}.pem"));
    for (version, spoken) in [("-tls1_2", false), ("-tls1_3", true)] {
        let mut openssl = std::process::Command::new("openssl");
        openssl
            .args(["s_client", version, "-connect", &address, "-CAfile"])
            .arg(file("ca"));
        openssl
            .arg("-cert")
            .arg(file("cert"))
            .arg("-key")
            .arg(file("key"));
        let done = openssl.stdin(std::process::Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&done.stdout);
        assert_eq!(
            !told.contains("no peer certificate available"),
            spoken,
            "{version}: {told}"
        );
    }
}

#[test]
fn other_machines_are_let_in_only_with_certificates_and_tokens_or_by_saying_so() {
    let place = Place::new();
    let make = [
        "certs",
        "make",
        "certs",
        "--coordinator",
        "c0",
        "--worker",
        "w0",
    ];
    place.emberline(&make).run().expect_code(0);
    let generate = [
        "tokens", "generate", "root", "--role", "admin", "--to", "t", "--hashes", "h",
    ];
    place.emberline(&generate).run().expect_code(0);
    fs::create_dir(place.path("objects")).unwrap();
    let artifacts = format!("file://{}", place.path("objects").display());
    let listen = format!("0.0.0.0:{}", processes::free_port());
    let base = [
        "coordinator",
        "--listen",
        &listen,
        "--advertise",
        "localhost:1",
        "--etcd",
        "http://127.0.0.1:1",
        "--artifacts",
        &artifacts,
    ];
    let tls = identity(&place, "c0");
    for (variables, more, told) in [
        (&[][..], &[][..], "neither certificates nor tokens"),
        (&[], &["--tokens-file", "h"], "no certificates"),
        (&tls[..], &[], "no tokens"),
    ] {
        let call = place.emberline(&[&base[..], more].concat()).envs(variables);
        let refused = call.run().expect_code(2);
        assert!(refused.stderr.contains(told), "{refused}");
        assert_eq!(refused.errors().len(), 1, "{refused}");
    }
    for (variables, more) in [
        (&tls[..], &["--tokens-file", "h"][..]),
        (&[], &["--insecure"]),
    ] {
        let call = place.emberline(&[&base[..], more].concat()).envs(variables);
        let running = call.start();
        wait_for("the start", seconds(20), || {
            running.stdout().contains("serves on").then_some(())
        });
        let warned = running.stderr().contains("INSECURE");
        assert_eq!(warned, more.contains(&"--insecure"), "{}", running.stderr());
        drop(running);
    }
    // A file of tokens with a wrong line is named with the line, and nothing of it is shown.
    let secret = fs::read_to_string(place.path("t")).unwrap();
    place.write("wrong", format!("# tokens\nadmin root {secret}\n"));
    let wrong = [&base[..], &["--tokens-file", "wrong", "--insecure"]].concat();
    let refused = place.emberline(&wrong).run().expect_code(2);
    assert!(refused.stderr.contains("wrong:2: "), "{refused}");
    assert!(!refused.stderr.contains(secret.trim()), "{refused}");
    let serve = [
        "worker",
        "--server",
        "127.0.0.1:1",
        "--serve",
        "0.0.0.0:1",
        "--serve-advertise",
        "a:1",
    ];
    let refused = place.emberline(&serve).run().expect_code(2);
    assert!(refused.stderr.contains("no certificates"), "{refused}");
}

#[test]
fn what_is_asked_whether_it_is_well_says_so() {
    let mut cluster = Secured::start();
    let leader = cluster.wait_for_leader();
    let address = cluster.servers().split(',').nth(leader).unwrap().to_owned();
    let certificates = identity(&cluster.place, "c0");
    let asked = |what: &str, address: &str| {
        cluster
            .place
            .emberline(&["health", what, address])
            .envs(&certificates)
            .run()
    };
    asked("coordinator", &address).expect_code(0);
    let closed = format!("127.0.0.1:{}", processes::free_port());
    asked("coordinator", &closed).expect_code(3);
    asked("coordinator", "nonsense").expect_code(2);
    let mut worker = cluster.worker("w0", "w0", "join");
    worker.start();
    cluster.wait_for_worker("w0", true);
    let metrics = worker_metrics(&worker);
    asked("worker", &metrics).expect_code(0);
    for node in &mut cluster.coordinators {
        node.kill();
    }
    let asked = |what: &str, address: &str| {
        cluster
            .place
            .emberline(&["health", what, address])
            .envs(&certificates)
            .run()
    };
    wait_for("the lost session", seconds(20), || {
        (asked("worker", &metrics).code == Some(3)).then_some(())
    });
}

/// Waits until a process has told that.
#[track_caller]
fn says(node: &emberline_tests::node::Node, what: &str) {
    wait_for(what, seconds(30), || {
        node.stderr().contains(what).then_some(())
    });
}

/// Where a worker shows its metrics: the last of its arguments.
fn worker_metrics(worker: &emberline_tests::node::Node) -> String {
    let line =
        fs::read_to_string(format!("/proc/{}/cmdline", worker.pid().as_raw_nonzero())).unwrap();
    line.split('\0')
        .rfind(|word| !word.is_empty())
        .unwrap()
        .to_owned()
}
