//! `certs`: the authority and the certificates of a cluster, as files below one directory.
//!
//! Nothing but the files is kept: what is there, whose names fit and that does not expire soon, stays.
//! So it can be run as often as one likes, and `--every` does so by itself.

mod authority;

use std::{collections::BTreeSet, path::Path, time::Duration};

use emberline_common::{
    spec::DurationText,
    time::Timestamp,
    tls::{CertificateRole, Facts},
};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use self::authority::{Authority, Wanted};
use crate::{
    args::{CertsCommand, Format, MakeCerts},
    exit::Exit,
    output,
};

/// No certificate is valid for longer: what is stolen is of use for as long.
const MOST_TTL: Duration = Duration::from_hours(24 * 398);
const LEAST_TTL: Duration = Duration::from_secs(60);

/// Does one of them.
pub async fn certs(command: CertsCommand, quiet: bool, format: Format) -> anyhow::Result<()> {
    match command {
        CertsCommand::Make(what) => make(&what, quiet).await,
        CertsCommand::Show { directory } => show(&directory, format),
        CertsCommand::Revoke { directory, names } => {
            let authority = Authority::load(&directory)?;
            for name in &names {
                check_name(name)?;
            }
            authority.revoke(&names)?;
            if !quiet {
                let list = directory.join("crl.pem");
                output::line(format!("revoked in {}", list.display()))?;
            }
            Ok(())
        }
    }
}

async fn make(what: &MakeCerts, quiet: bool) -> anyhow::Result<()> {
    let (ttl, renew_within) = times(what)?;
    let wanted = wanted(what)?;
    let Some(every) = what.every else {
        return make_once(&what.directory, &wanted, ttl, renew_within, quiet);
    };
    if every.0 < Duration::from_secs(1) || every.0 > renew_within {
        return Err(Exit::input(format!(
            "`--every {every}` must be between 1s and `--renew-within`, {}: else certificates expire",
            DurationText(renew_within)
        ))
        .into());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        make_once(&what.directory, &wanted, ttl, renew_within, quiet)?;
        tokio::select! {
            () = tokio::time::sleep(every.0) => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

fn make_once(
    directory: &Path,
    wanted: &[Wanted],
    ttl: Duration,
    renew_within: Duration,
    quiet: bool,
) -> anyhow::Result<()> {
    let say = |line: String| if quiet { Ok(()) } else { output::line(line) };
    let (authority, is_new) = Authority::load_or_make(directory)?;
    if is_new {
        say(format!(
            "made the authority {}",
            directory.join("ca.pem").display()
        ))?;
    }
    let now = Timestamp::now();
    for wanted in wanted {
        let why = match authority.find(wanted)? {
            None => "made",
            Some(facts) if hosts(&facts) != wanted.hosts => "made anew, since its names differ,",
            Some(facts) if facts.identity.as_ref() != Some(&wanted.identity) => {
                "made anew, since its role differs,"
            }
            Some(facts) if facts.not_after <= now.after(renew_within) => "renewed",
            Some(_) => continue,
        };
        let until = authority.issue(wanted, ttl)?;
        say(format!("{why} {}, valid until {until}", wanted.identity))?;
    }
    Ok(())
}

fn hosts(facts: &Facts) -> BTreeSet<String> {
    facts.hosts.iter().cloned().collect()
}

fn times(what: &MakeCerts) -> Result<(Duration, Duration), Exit> {
    let ttl = what.ttl.0;
    if !(LEAST_TTL..=MOST_TTL).contains(&ttl) {
        return Err(Exit::input(format!(
            "`--ttl {}` must be between {} and {}",
            what.ttl,
            DurationText(LEAST_TTL),
            DurationText(MOST_TTL)
        )));
    }
    let within = what.renew_within.map_or(ttl / 3, |within| within.0);
    if within >= ttl {
        return Err(Exit::input(format!(
            "`--renew-within {}` is not shorter than `--ttl {}`: each certificate would be made anew each time",
            DurationText(within),
            what.ttl
        )));
    }
    Ok((ttl, within))
}

fn wanted(what: &MakeCerts) -> Result<Vec<Wanted>, Exit> {
    let groups = [
        (CertificateRole::Coordinator, &what.coordinator),
        (CertificateRole::Worker, &what.worker),
        (CertificateRole::Workers, &what.workers),
        (CertificateRole::Client, &what.client),
        (CertificateRole::Server, &what.other),
    ];
    let mut all: Vec<Wanted> = Vec::new();
    for (role, texts) in groups {
        for text in texts {
            let (name, hosts) = match text.split_once(':') {
                None => (text.as_str(), ""),
                Some((name, hosts)) => (name, hosts),
            };
            check_name(name)?;
            let hosts = hosts.split(',').map(str::trim).filter(|h| !h.is_empty());
            let wanted = Wanted::new(role, name, hosts).map_err(Exit::input)?;
            if all.iter().any(|known| known.identity.name == name) {
                return Err(Exit::input(format!("`{name}` is given twice")));
            }
            all.push(wanted);
        }
    }
    if all.is_empty() {
        return Err(Exit::input(
            "say whose certificates to make: `--coordinator`, `--worker`, `--workers`, `--client`, `--other`",
        ));
    }
    Ok(all)
}

/// A name becomes a directory.
fn check_name(name: &str) -> Result<(), Exit> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let fits = (1..=64).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if fits {
        return Ok(());
    }
    Err(Exit::input(format!(
        "`{}` is no name: use 1 to 64 letters, digits, `.`, `_` and `-`, and begin with a letter or digit",
        name.escape_debug()
    )))
}

fn show(directory: &Path, format: Format) -> anyhow::Result<()> {
    let authority = Authority::load(directory)?;
    let revoked = authority.revoked()?;
    let mut found = vec![("ca".to_owned(), authority.facts()?)];
    found.extend(authority.all()?);
    let state = |facts: &Facts| {
        if revoked.iter().any(|(serial, _)| *serial == facts.serial) {
            "revoked"
        } else if facts.not_after <= Timestamp::now() {
            "expired"
        } else {
            "valid"
        }
    };
    if format == Format::Json {
        let each = found.iter().map(|(name, facts)| {
            json!({
                "name": name,
                "identity": facts.identity.as_ref().map(ToString::to_string),
                "hosts": facts.hosts,
                "not_after": facts.not_after.to_string(),
                "state": state(facts),
            })
        });
        return output::json(&each.collect::<Vec<_>>());
    }
    let rows = found.iter().map(|(name, facts)| {
        let identity = facts.identity.as_ref();
        vec![
            name.clone(),
            identity.map_or_else(|| "-".to_owned(), |i| i.role.as_str().to_owned()),
            state(facts).to_owned(),
            facts.not_after.to_string(),
            facts.hosts.join(", "),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    output::table(&["NAME", "ROLE", "STATE", "UNTIL", "HOSTS"], &rows)?;
    Ok(())
}
