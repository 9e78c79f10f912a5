//! Against a real etcd: a process of its own for each test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client, DeleteOptions};

use super::{super::conformance, *};
use crate::store::check_schema;

const LIMIT: Duration = Duration::from_secs(20);

/// One member, killed when it is dropped.
struct Etcd {
    process: Child,
    url: String,
    _dir: tempfile::TempDir,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Etcd {
    /// It need not answer yet.
    fn spawn(scheme: &str, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("{scheme}://127.0.0.1:{}", free_port());
        let peer = format!("http://127.0.0.1:{}", free_port());
        let process = Command::new("etcd")
            .args(["--name", "m", "--log-level", "error"])
            .arg("--data-dir")
            .arg(dir.path())
            .args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("`etcd` is installed: see deploy/prerequisites.sh");
        Self {
            process,
            url,
            _dir: dir,
        }
    }

    async fn start(more: &[&str]) -> Self {
        let etcd = Self::spawn("http", more);
        tokio::time::timeout(LIMIT, async {
            while etcd.client().await.get("x", None).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("etcd is up in time");
        etcd
    }

    async fn client(&self) -> Client {
        Client::connect([&self.url], None).await.unwrap()
    }

    fn config(&self, prefix: &str) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![self.url.clone()],
            prefix: prefix.to_owned(),
            user: None,
            tls: None,
            lease_ttl: Duration::from_secs(3),
            compact_every: None,
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One prefix of one etcd.
struct OnePrefix<'a> {
    etcd: &'a Etcd,
    prefix: String,
}

impl conformance::Harness for OnePrefix<'_> {
    fn open(&self) -> BoxFuture<'_, Arc<dyn StateStore>> {
        Box::pin(async {
            let store = EtcdStore::open(self.etcd.config(&self.prefix)).await;
            Arc::new(store.unwrap()) as Arc<dyn StateStore>
        })
    }

    fn depose<'a>(&'a self, _store: &'a dyn StateStore) -> BoxFuture<'a, ()> {
        Box::pin(async {
            let mut client = self.etcd.client().await;
            let key = format!("{}/leader", self.prefix);
            client.delete(key.as_str(), None).await.unwrap();
            let value = r#"{"name":"usurper","address":"127.0.0.1:2"}"#;
            client.put(key, value, None).await.unwrap();
        })
    }
}

#[tokio::test]
async fn the_etcd_store_conforms() {
    let etcd = Etcd::start(&[]).await;
    let number = AtomicUsize::new(0);
    let tests = conformance::tests().into_iter().map(|(name, test)| {
        let number = number.fetch_add(1, Ordering::Relaxed);
        let harness = OnePrefix {
            etcd: &etcd,
            prefix: format!("test-{number}"),
        };
        async move {
            eprintln!("conformance: {name}");
            test(&harness).await;
        }
    });
    futures::future::join_all(tests).await;
}

fn put(key: &str, value: &str) -> Write {
    Write::Put {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
    }
}

#[tokio::test]
async fn a_commit_that_was_journaled_but_not_applied_is_finished_by_the_next_leader() {
    let etcd = Etcd::start(&[]).await;
    let first = EtcdStore::open(etcd.config("e")).await.unwrap();
    let epoch = first.campaign(conformance::candidate("a")).await.unwrap();
    first.commit(epoch, vec![put("old", "1")]).await.unwrap();
    let term = first.inner.term(epoch).unwrap();
    let writes: Vec<Write> = (0..500).map(|i| put(&format!("k/{i:03}"), "v")).collect();
    // What a leader leaves that dies right after the commit of its journal.
    let mut last = term.last.lock().await;
    first
        .inner
        .journal(&term, &mut last, &writes)
        .await
        .unwrap();
    drop(last);
    first.resign(epoch).await.unwrap();

    let second = EtcdStore::open(etcd.config("e")).await.unwrap();
    assert_eq!(second.load("").await.unwrap().len(), 1, "not applied yet");
    let epoch = second.campaign(conformance::candidate("b")).await.unwrap();
    assert_eq!(second.load("k/").await.unwrap().len(), 500);
    assert!(second.inner.journal_is_empty().await);
    second.commit(epoch, vec![put("new", "1")]).await.unwrap();
}

#[tokio::test]
async fn a_leader_that_cannot_renew_stops_before_its_lease_can_have_run_out() {
    let etcd = Etcd::start(&[]).await;
    let store = EtcdStore::open(etcd.config("e")).await.unwrap();
    let epoch = store.campaign(conformance::candidate("a")).await.unwrap();
    assert!(store.holds(epoch));
    let begun = Instant::now();
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&etcd.process),
        rustix::process::Signal::STOP,
    )
    .unwrap();
    tokio::time::timeout(LIMIT, store.term_ended(epoch))
        .await
        .expect("the term ends by itself");
    assert!(!store.holds(epoch));
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    let trouble = store.trouble().unwrap().text;
    assert!(trouble.contains("no quorum since"), "{trouble}");
    let late = store.commit(epoch, vec![put("k", "late")]).await;
    assert!(matches!(late, Err(StoreError::Deposed { .. })), "{late:?}");
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&etcd.process),
        rustix::process::Signal::CONT,
    )
    .unwrap();
    // It recovers without a restart.
    let again = tokio::time::timeout(LIMIT, store.campaign(conformance::candidate("a")));
    let again = again.await.expect("it leads again").unwrap();
    assert!(again > epoch);
    store.commit(again, vec![put("k", "2")]).await.unwrap();
    assert_eq!(store.trouble(), None);
}

#[tokio::test]
async fn the_end_of_a_dead_leader_need_not_be_waited_for() {
    let etcd = Etcd::start(&[]).await;
    let dead = EtcdStore::open(etcd.config("e")).await.unwrap();
    let first = dead.campaign(conformance::candidate("a")).await.unwrap();
    let next = EtcdStore::open(etcd.config("e")).await.unwrap();
    let begun = Instant::now();
    let (epoch, deposed) = tokio::join!(
        next.campaign(conformance::candidate("b")),
        next.depose(first)
    );
    deposed.unwrap();
    assert!(epoch.unwrap() > first);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    let late = dead.commit(first, vec![put("k", "late")]).await;
    assert!(matches!(late, Err(StoreError::Deposed { .. })), "{late:?}");
    // Deposing a term that is over ends nobody's.
    next.depose(first).await.unwrap();
    let leader = next.leader().await.unwrap().unwrap();
    assert_eq!(leader.name, "b");
}

#[tokio::test]
async fn a_full_etcd_is_said_and_waited_for() {
    let etcd = Etcd::start(&["--quota-backend-bytes", "1048576"]).await;
    let store = EtcdStore::open(etcd.config("e")).await.unwrap();
    let epoch = store.campaign(conformance::candidate("a")).await.unwrap();
    check_schema(&store, epoch).await.unwrap();
    let big = "x".repeat(60 << 10);
    // The commit that finds etcd full goes on to its end: a next one would take its number.
    let full = std::cell::Cell::new(false);
    let fill = async {
        for n in 0..100 {
            let writes = (0..4).map(|i| put(&format!("{n}/{i}"), &big)).collect();
            store.commit(epoch, writes).await.unwrap();
            if full.get() {
                return;
            }
        }
    };
    let told = async {
        while store.trouble().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        full.set(true);
    };
    tokio::pin!(fill);
    tokio::select! {
        () = &mut fill => panic!("etcd was not full"),
        told = tokio::time::timeout(LIMIT, told) => told.expect("it is said"),
    }
    let trouble = store.trouble().unwrap().text;
    assert!(trouble.contains("out of space"), "{trouble}");
    assert!(store.holds(epoch), "the lease is renewed all the same");

    let late = async {
        fill.await;
        store.commit(epoch, vec![put("late", "1")]).await
    };
    let heal = async {
        let mut client = etcd.client().await;
        let everything = DeleteOptions::new().with_prefix();
        let deleted = client.delete("e/state/", Some(everything)).await.unwrap();
        let revision = deleted.header().unwrap().revision();
        client.compact(revision, None).await.unwrap();
        client.defragment().await.unwrap();
        let raised = client.alarm(AlarmAction::Get, AlarmType::Nospace, None);
        for alarm in raised.await.unwrap().alarms() {
            let mut member = AlarmOptions::new();
            member.with_member(alarm.member_id());
            let disarmed = client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(member));
            disarmed.await.unwrap();
        }
    };
    let (late, ()) = tokio::join!(tokio::time::timeout(LIMIT, late), heal);
    late.expect("it goes on by itself").unwrap();
    assert_eq!(store.trouble(), None);
    assert_eq!(store.load("late").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_prefix_of_another_cluster_is_refused() {
    let etcd = Etcd::start(&[]).await;
    let store = EtcdStore::open(etcd.config("e")).await.unwrap();
    let epoch = store.campaign(conformance::candidate("a")).await.unwrap();
    store.claim(epoch, "s3://one/x").await.unwrap();
    store.claim(epoch, "s3://one/x").await.unwrap();
    let refused = store.claim(epoch, "s3://two/x").await;
    assert!(
        matches!(refused, Err(StoreError::OtherCluster { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn those_who_are_there_are_listed_until_they_leave() {
    let etcd = Etcd::start(&[]).await;
    let store = EtcdStore::open(etcd.config("e")).await.unwrap();
    let candidate = conformance::candidate("a");
    let there = store.announce(candidate.clone());
    let listed = async {
        while store.coordinators().await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = there => panic!("it ends by itself"),
        listed = tokio::time::timeout(LIMIT, listed) => listed.expect("it is listed"),
    }
    assert_eq!(store.coordinators().await.unwrap(), [candidate]);
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_waited_for() {
    let port = free_port();
    let config = EtcdConfig {
        endpoints: vec![format!("http://127.0.0.1:{port}")],
        prefix: "e".to_owned(),
        user: None,
        tls: None,
        lease_ttl: Duration::from_secs(2),
        compact_every: None,
    };
    let store = EtcdStore::open(config).await.unwrap();
    let trouble = store.trouble().unwrap().text;
    assert!(trouble.contains("can be reached since"), "{trouble}");
    assert!(trouble.contains(&port.to_string()), "{trouble}");
}

#[tokio::test]
async fn a_user_and_a_password_are_asked_for_and_given() {
    let etcd = Etcd::start(&[]).await;
    let mut admin = etcd.client().await;
    admin.role_add("root").await.unwrap();
    admin.user_add("root", "secret", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();
    let with = |password: Option<&str>| EtcdConfig {
        user: password.map(|p| ("root".to_owned(), p.to_owned())),
        ..etcd.config("e")
    };
    for wrong in [None, Some("wrong")] {
        let refused = EtcdStore::open(with(wrong)).await.err().unwrap();
        let text = refused.to_string();
        assert!(!text.contains("wrong"), "{text}");
        assert!(matches!(refused, StoreError::Failed { .. }), "{text}");
    }
    let store = EtcdStore::open(with(Some("secret"))).await.unwrap();
    let epoch = store.campaign(conformance::candidate("a")).await.unwrap();
    store.commit(epoch, vec![put("k", "1")]).await.unwrap();
    assert_eq!(store.load("").await.unwrap().len(), 1);
}

/// Certificates of an authority, a server at 127.0.0.1 and a client, in a directory.
fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let done = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(dir.path())
            .output()
            .expect("`openssl` is installed: see deploy/prerequisites.sh");
        let told = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "openssl {arguments}: {told}");
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!(
        "req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca"
    ));
    for name in ["server", "client"] {
        std::fs::write(
            dir.path().join("ext"),
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n",
        )
        .unwrap();
        openssl(&format!(
            "req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile ext"
        ));
    }
    dir
}

#[tokio::test]
async fn a_member_and_a_client_show_each_other_their_certificates() {
    emberline_common::tls::install_crypto_provider();
    let dir = certificates();
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let (certificate, key, ca) = (text("server.pem"), text("server.key"), text("ca.pem"));
    let etcd = Etcd::spawn(
        "https",
        &[
            "--client-cert-auth",
            "--cert-file",
            &certificate,
            "--key-file",
            &key,
            "--trusted-ca-file",
            &ca,
        ],
    );
    let with = |tls: Option<EtcdTls>| EtcdConfig {
        tls,
        ..etcd.config("e")
    };
    let both = EtcdTls::read(
        Some(path("ca.pem")),
        Some(path("client.pem")),
        Some(path("client.key")),
    );
    // It waits until the member is up.
    let store = EtcdStore::open(with(both.unwrap())).await.unwrap();
    let led = tokio::time::timeout(LIMIT, store.campaign(conformance::candidate("a")));
    let epoch = led.await.expect("it leads in time").unwrap();
    store.commit(epoch, vec![put("k", "1")]).await.unwrap();
    // Without a certificate of ours the member says nothing.
    let nameless = EtcdTls::read(Some(path("ca.pem")), None, None).unwrap();
    let stranger = EtcdStore::open(with(nameless)).await.unwrap();
    assert!(stranger.trouble().is_some());
    // One of another authority is refused; when it is replaced by ours, the same store goes on.
    let theirs = certificates();
    let own = ["own.pem", "own.key"].map(path);
    let put_there = |from: &std::path::Path| {
        for (name, to) in ["client.pem", "client.key"].iter().zip(&own) {
            std::fs::copy(from.join(name), to).unwrap();
        }
    };
    put_there(theirs.path());
    let [certificate, key] = own.clone();
    let renewed = EtcdTls::read(Some(path("ca.pem")), Some(certificate), Some(key));
    let renewed = EtcdStore::open(with(renewed.unwrap())).await.unwrap();
    assert!(renewed.trouble().is_some());
    put_there(dir.path());
    let read = tokio::time::timeout(LIMIT, renewed.load(""));
    assert_eq!(read.await.expect("it is read in time").unwrap().len(), 1);
}
