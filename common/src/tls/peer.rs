//! What a certificate says of its owner.
//!
//! `emberline certs` puts a URI `emberline://ROLE/NAME` beside the names of hosts (RFC 5280, section
//! 4.2.1.6). A certificate that has none, of another tool say, is nobody in particular: then the token
//! alone decides what its owner may do.

use std::{fmt, net::IpAddr, str::FromStr};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::time::Timestamp;

/// What the URI begins with.
const SCHEME: &str = "emberline://";

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CertificateRole {
    /// A coordinator.
    Coordinator,
    /// The worker of that name.
    Worker,
    /// Any of several workers.
    Workers,
    /// Whoever calls: people, programs, Prometheus.
    Client,
    /// A server that is none of ours: etcd, the object store.
    Server,
}

impl CertificateRole {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Workers => "workers",
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

impl FromStr for CertificateRole {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "coordinator" => Ok(Self::Coordinator),
            "worker" => Ok(Self::Worker),
            "workers" => Ok(Self::Workers),
            "client" => Ok(Self::Client),
            "server" => Ok(Self::Server),
            _ => Err(()),
        }
    }
}

/// Whose certificate it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What for.
    pub role: CertificateRole,
    /// Whose.
    pub name: String,
}

impl Identity {
    /// As a certificate has it.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("{SCHEME}{self}")
    }

    /// Of a certificate that has one.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        names.value.general_names.iter().find_map(|name| {
            let GeneralName::URI(uri) = name else {
                return None;
            };
            let (role, name) = uri.strip_prefix(SCHEME)?.split_once('/')?;
            let role = role.parse().ok()?;
            (!name.is_empty()).then(|| Self {
                role,
                name: name.to_owned(),
            })
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role.as_str(), self.name)
    }
}

/// What people want to know of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Whose it is, if it says so.
    pub identity: Option<Identity>,
    /// The hosts that it is for: names and addresses.
    pub hosts: Vec<String>,
    /// Until when it is valid.
    pub not_after: Timestamp,
    /// Its number, by which it is revoked.
    pub serial: Vec<u8>,
}

impl Facts {
    /// Of the first certificate of a text in PEM.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence that begins with the file's name.
    pub fn of_pem(text: &[u8]) -> Result<Self, String> {
        let first = CertificateDer::from_pem_slice(text);
        let first = first.map_err(|e| format!("has no certificate in PEM: {e}"))?;
        let parsed = X509Certificate::from_der(&first);
        let (_, parsed) = parsed.map_err(|e| format!("has a certificate that is none: {e}"))?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map(|names| names.value.general_names.iter());
        let hosts = names.into_iter().flatten().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes)
                    .ok()
                    .map(|ip| IpAddr::from(ip).to_string()),
                _ => <[u8; 16]>::try_from(*bytes)
                    .ok()
                    .map(|ip| IpAddr::from(ip).to_string()),
            },
            _ => None,
        });
        Ok(Self {
            identity: Identity::of(&first),
            hosts: hosts.collect(),
            not_after: not_after(&first)?,
            serial: parsed.raw_serial().to_vec(),
        })
    }
}

/// The end of a certificate's validity.
///
/// # Errors
/// What is wrong with it.
pub fn not_after(certificate: &CertificateDer<'_>) -> Result<Timestamp, String> {
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|e| format!("has a certificate that is none: {e}"))?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(Timestamp(seconds.saturating_mul(1_000_000)))
}
