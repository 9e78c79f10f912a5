//! The authority: its key, what it has signed, and what it has revoked.

use std::{
    collections::BTreeSet,
    fs, io,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use emberline_common::{
    time::Timestamp,
    tls::{CertificateRole, Facts, Identity},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use sha2::{Digest as _, Sha256};

use crate::exit::Exit;

/// How long the authority is valid.
const CA_TTL: Duration = Duration::from_hours(24 * 3650);
/// Clocks of other machines may be behind this one's.
const BACK_DATED: Duration = Duration::from_secs(300);

/// See the module.
pub(super) struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate that is to be there.
pub(super) struct Wanted {
    pub identity: Identity,
    /// Names and addresses.
    pub hosts: BTreeSet<String>,
}

impl Wanted {
    /// For that name and these hosts.
    ///
    /// # Errors
    /// The host that is none.
    pub fn new<'a>(
        role: CertificateRole,
        name: &str,
        hosts: impl Iterator<Item = &'a str>,
    ) -> Result<Self, String> {
        let mut all: BTreeSet<String> = BTreeSet::new();
        if role != CertificateRole::Client {
            for known in [name, "localhost", "127.0.0.1", "::1"] {
                all.insert(known.to_owned());
            }
        }
        for host in hosts {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._*".contains(c);
            let host = match host.parse::<IpAddr>() {
                Ok(address) => address.to_string(),
                Err(_) if host.len() <= 253 && host.chars().all(plain) => host.to_owned(),
                Err(_) => return Err(format!("`{}` is no host", host.escape_debug())),
            };
            all.insert(host);
        }
        let identity = Identity {
            role,
            name: name.to_owned(),
        };
        Ok(Self {
            identity,
            hosts: all,
        })
    }
}

impl Authority {
    /// The one in that directory.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn load(directory: &Path) -> Result<Self, Exit> {
        let certificate = read(&directory.join("ca.pem"))?;
        let key_file = directory.join("ca-key.pem");
        let key = KeyPair::from_pem(&read(&key_file)?).map_err(|_| {
            Exit::input(format!("`{}` is no private key in PEM", key_file.display()))
        })?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(|e| {
            let file = directory.join("ca.pem");
            Exit::input(format!("`{}` is no authority: {e}", file.display()))
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            issuer,
        })
    }

    /// The one in that directory, or a new one there; says whether it is new.
    ///
    /// # Errors
    /// It cannot be read, or not be made.
    pub fn load_or_make(directory: &Path) -> Result<(Self, bool), Exit> {
        let (certificate, key) = (directory.join("ca.pem"), directory.join("ca-key.pem"));
        if certificate.exists() || key.exists() {
            return Ok((Self::load(directory)?, false));
        }
        make_directory(directory)?;
        let pair = KeyPair::generate().map_err(failed)?;
        let mut params = params(CA_TTL);
        // No two have the same name, so that a certificate of another one is seen to be that.
        let id = Sha256::digest(pair.public_key_raw());
        let name = format!(
            "Emberline authority {:02x}{:02x}{:02x}{:02x}",
            id[0], id[1], id[2], id[3]
        );
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let signed = params.self_signed(&pair).map_err(failed)?;
        write(&key, &pair.serialize_pem(), 0o600)?;
        write(&certificate, &signed.pem(), 0o644)?;
        Ok((Self::load(directory)?, true))
    }

    /// What is known of the authority itself.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn facts(&self) -> Result<Facts, Exit> {
        facts(&self.directory.join("ca.pem"))
    }

    /// The certificate of that name, if there is one whose key is there as well.
    ///
    /// # Errors
    /// It is none.
    pub fn find(&self, wanted: &Wanted) -> Result<Option<Facts>, Exit> {
        let directory = self.directory.join(&wanted.identity.name);
        let all = ["cert.pem", "key.pem", "ca.pem"];
        if !all.iter().all(|file| directory.join(file).exists()) {
            return Ok(None);
        }
        facts(&directory.join("cert.pem")).map(Some)
    }

    /// All certificates of the directory, by name.
    ///
    /// # Errors
    /// The directory cannot be read, or something in it is no certificate.
    pub fn all(&self) -> Result<Vec<(String, Facts)>, Exit> {
        let entries = fs::read_dir(&self.directory);
        let entries = entries.map_err(|e| cannot("read", &self.directory, &e))?;
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let file = entry.path().join("cert.pem");
            if file.exists() {
                let name = entry.file_name().to_string_lossy().into_owned();
                all.push((name, facts(&file)?));
            }
        }
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Makes a certificate with a new key; says until when it is valid.
    ///
    /// # Errors
    /// It cannot be made, or not be written.
    pub fn issue(&self, wanted: &Wanted, ttl: Duration) -> Result<Timestamp, Exit> {
        let mut params = params(ttl);
        let name = wanted.identity.to_string();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if wanted.identity.role != CertificateRole::Client {
            let serve = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(serve);
        }
        for host in &wanted.hosts {
            params.subject_alt_names.push(match host.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host.as_str().try_into().map_err(failed)?),
            });
        }
        let uri = wanted.identity.uri();
        let uri = SanType::URI(uri.as_str().try_into().map_err(failed)?);
        params.subject_alt_names.push(uri);
        let pair = KeyPair::generate().map_err(failed)?;
        let signed = params.signed_by(&pair, &self.issuer).map_err(failed)?;
        let directory = self.directory.join(&wanted.identity.name);
        make_directory(&directory)?;
        let authority = read(&self.directory.join("ca.pem"))?;
        write(&directory.join("ca.pem"), &authority, 0o644)?;
        // Whoever reads a new key beside the old certificate finds that they differ, and looks again.
        write(&directory.join("key.pem"), &pair.serialize_pem(), 0o600)?;
        write(&directory.join("cert.pem"), &signed.pem(), 0o644)?;
        Ok(facts(&directory.join("cert.pem"))?.not_after)
    }

    /// The numbers of revoked certificates, each with when it was revoked.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn revoked(&self) -> Result<Vec<(Vec<u8>, Timestamp)>, Exit> {
        let file = self.directory.join("revoked.json");
        if !file.exists() {
            return Ok(Vec::new());
        }
        serde_json::from_str(&read(&file)?)
            .map_err(|e| Exit::input(format!("`{}`: {e}", file.display())))
    }

    /// Adds the certificates of these names to the list of revoked ones.
    ///
    /// # Errors
    /// There is no such certificate, or the list cannot be written.
    pub fn revoke(&self, names: &[String]) -> Result<(), Exit> {
        let mut revoked = self.revoked()?;
        let now = Timestamp::now();
        for name in names {
            let facts = facts(&self.directory.join(name).join("cert.pem"))?;
            if !revoked.iter().any(|(serial, _)| *serial == facts.serial) {
                revoked.push((facts.serial, now));
            }
        }
        let number = revoked.len() as u64;
        let each = revoked.iter().map(|(serial, at)| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: moment(*at).into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: moment(now.before(BACK_DATED)).into(),
            next_update: moment(now.after(CA_TTL)).into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: each.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).map_err(failed)?;
        let record = serde_json::to_string(&revoked).map_err(failed)?;
        write(&self.directory.join("revoked.json"), &record, 0o644)?;
        let list = list.pem().map_err(failed)?;
        write(&self.directory.join("crl.pem"), &list, 0o644)
    }
}

fn params(ttl: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let now = SystemTime::now();
    params.not_before = (now - BACK_DATED).into();
    params.not_after = (now + ttl).into();
    params
}

fn moment(at: Timestamp) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(at.0)
}

fn facts(file: &Path) -> Result<Facts, Exit> {
    let text = read(file)?;
    let facts = Facts::of_pem(text.as_bytes());
    facts.map_err(|what| Exit::input(format!("`{}` {what}", file.display())))
}

fn failed(e: impl std::fmt::Display) -> Exit {
    Exit::cluster(format!("cannot make the certificate: {e}"))
}

fn cannot(what: &str, path: &Path, e: &io::Error) -> Exit {
    Exit::input(format!("cannot {what} `{}`: {e}", path.display()))
}

fn read(path: &Path) -> Result<String, Exit> {
    fs::read_to_string(path).map_err(|e| cannot("read", path, &e))
}

fn make_directory(path: &Path) -> Result<(), Exit> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(|e| cannot("make", path, &e))
}

/// Replaces a file as a whole.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), Exit> {
    let partial = path.with_extension("partial");
    let written = || {
        let _ = fs::remove_file(&partial);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        fs::rename(&partial, path)
    };
    written().map_err(|e| cannot("write", path, &e))
}
