//! The certificates of a process: files that are read, and read again when they have changed.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use opentelemetry::metrics::Meter;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
        pem::{self, PemObject as _},
    },
    server::WebPkiClientVerifier,
    version::TLS13,
};
use thiserror::Error;

use super::peer;
use crate::{reload::Reloaded, time::Timestamp};

/// No certificate or list is larger.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where the certificates are, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority that signed every certificate of the cluster.
    pub ca: PathBuf,
    /// Our own certificate, and its key. Without them only what asks for no certificate can be
    /// connected to, and nothing can be served.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Certificates that are refused although the authority has signed them.
    pub revoked: Option<PathBuf>,
}

/// What is wrong with a certificate.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("`{}` {what}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There is no certificate to serve with.
    #[error("to serve with TLS takes a certificate and its key")]
    NoIdentity,
}

/// The certificates of this process. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    files: Arc<TlsFiles>,
    material: Arc<Reloaded<Material>>,
}

/// What the files say.
struct Material {
    server: Option<Arc<ServerConfig>>,
    client: Arc<ClientConfig>,
    expires: Option<Timestamp>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.files).finish()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError`] names the file and what is wrong with it.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let files = Arc::new(files);
        let all = files.all().cloned().collect();
        let material = {
            let files = Arc::clone(&files);
            Reloaded::open("certificates", all, move || files.read())?
        };
        Ok(Self { files, material })
    }

    /// Whether there is a certificate to serve with.
    ///
    /// # Errors
    /// [`TlsError::NoIdentity`].
    pub fn can_serve(&self) -> Result<(), TlsError> {
        match self.files.identity {
            Some(_) => Ok(()),
            None => Err(TlsError::NoIdentity),
        }
    }

    /// Until when our own certificate is valid.
    #[must_use]
    pub fn expires(&self) -> Option<Timestamp> {
        self.material.last().expires
    }

    /// Lets the end of the certificate's validity be seen as a metric, and renewed files be taken up
    /// whenever it is taken.
    pub fn observe(&self, meter: &Meter) {
        let material = Arc::downgrade(&self.material);
        let _ = meter
            .f64_observable_gauge("emberline.certificate.expiry_timestamp")
            .with_unit("s")
            .with_description("When this process's certificate expires, in seconds since 1970")
            .with_callback(move |observer| {
                let Some(material) = material.upgrade() else {
                    return;
                };
                material.look();
                if let Some(expires) = material.last().expires {
                    #[allow(clippy::cast_precision_loss, reason = "exact to the second")]
                    observer.observe((expires.0 / 1_000_000) as f64, &[]);
                }
            })
            .build();
    }

    /// How to answer a connection, by the files as they are now.
    pub(super) async fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let material = self.material.current().await;
        material.server.clone().ok_or(TlsError::NoIdentity)
    }

    /// How to open a connection, by the files as they are now.
    pub(super) async fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.material.current().await.client)
    }
}

impl TlsFiles {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        let identity = self.identity.iter();
        [&self.ca]
            .into_iter()
            .chain(identity.flat_map(|(certificate, key)| [certificate, key]))
            .chain(&self.revoked)
    }

    fn read(&self) -> Result<Material, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities = certificates(&self.ca)?;
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            (roots.add(authority)).map_err(|e| wrong(&self.ca, format!("is no authority: {e}")))?;
        }
        let roots = Arc::new(roots);
        let identity = match &self.identity {
            Some((certificate, key)) => Some((certificates(certificate)?, private_key(key)?)),
            None => None,
        };
        let expires = match (&identity, &self.identity) {
            (Some((chain, _)), Some((path, _))) => {
                let found = chain.first().map(|own| peer::not_after(own));
                found.transpose().map_err(|what| wrong(path, what))?
            }
            _ => None,
        };
        Ok(Material {
            server: match &identity {
                Some(identity) => Some(self.server(identity, &roots, &provider)?),
                None => None,
            },
            client: self.client(identity, roots, provider)?,
            expires,
        })
    }

    fn server(
        &self,
        (chain, key): &(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>),
        roots: &Arc<RootCertStore>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let mut verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider));
        if let Some(path) = &self.revoked {
            let lists = pem_file(path)?;
            let lists: Result<Vec<_>, _> =
                CertificateRevocationListDer::pem_slice_iter(&lists).collect();
            let lists = lists.map_err(|e| wrong(path, format!("is no list in PEM: {e}")))?;
            if lists.is_empty() {
                return Err(wrong(path, "has no list of revoked certificates".into()));
            }
            verifier = verifier.with_crls(lists);
        }
        let verifier = verifier
            .build()
            .map_err(|e| wrong(&self.ca, format!("cannot be used: {e}")))?;
        let config = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| self.pair(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key());
        let mut config = config.map_err(|e| self.pair(&e))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn client(
        &self,
        identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<ClientConfig>, TlsError> {
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| self.pair(&e))?
            .with_root_certificates(roots);
        let mut config = match identity {
            Some((chain, key)) => {
                let config = config.with_client_auth_cert(chain, key);
                config.map_err(|e| self.pair(&e))?
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// What is wrong with certificate and key as a pair.
    fn pair(&self, e: &rustls::Error) -> TlsError {
        let (certificate, key) = match &self.identity {
            Some((certificate, key)) => (certificate.as_path(), key.as_path()),
            None => (self.ca.as_path(), self.ca.as_path()),
        };
        let what = match e {
            rustls::Error::InconsistentKeys(_) => {
                format!("is not the certificate of the key `{}`", key.display())
            }
            e => format!("cannot be used with the key `{}`: {e}", key.display()),
        };
        wrong(certificate, what)
    }
}

fn wrong(path: &Path, what: String) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        what,
    }
}

fn pem_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    let read = || {
        let bytes = std::fs::metadata(path)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("{bytes} bytes are no PEM file")));
        }
        std::fs::read(path)
    };
    read().map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = pem_file(path)?;
    let all: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    let all = all.map_err(|e| wrong(path, format!("is no certificate in PEM: {e}")))?;
    if all.is_empty() {
        return Err(wrong(path, "has no certificate in PEM".into()));
    }
    Ok(all)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = pem_file(path)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|e| match e {
        pem::Error::NoItemsFound => wrong(path, "has no private key in PEM".into()),
        // Never what the file has.
        _ => wrong(path, "is no private key in PEM".into()),
    })
}
