//! Certificates and tokens, as the command line names them.

use std::path::{Path, PathBuf};

use clap::Args;
use emberline_common::{
    access::{MAX_TOKEN_BYTES, Token},
    tls::{Dialer, Tls, TlsFiles, install_crypto_provider},
};

use http::header;

use crate::exit::Exit;

/// The token itself; for programs that have it from elsewhere than a file. It is no flag: those are
/// seen by everybody on the machine.
const TOKEN_VARIABLE: &str = "EMBERLINE_TOKEN";

/// How a process shows who it is, and whom it believes.
#[derive(Debug, Clone, Default, Args)]
pub struct SecurityArguments {
    /// The authority that signed the cluster's certificates, in PEM. With it, connections to the cluster speak TLS.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_TLS_CA",
        value_name = "FILE",
        hide_short_help = true
    )]
    pub tls_ca: Option<PathBuf>,
    /// Our own certificate, in PEM; what this process serves speaks TLS with it. Renewed files are taken up by themselves.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_TLS_CERT",
        value_name = "FILE",
        hide_short_help = true
    )]
    pub tls_cert: Option<PathBuf>,
    /// The key of our own certificate, in PEM.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_TLS_KEY",
        value_name = "FILE",
        hide_short_help = true
    )]
    pub tls_key: Option<PathBuf>,
    /// Certificates that are refused although the authority has signed them: a list of revoked ones, in PEM.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_TLS_CRL",
        value_name = "FILE",
        hide_short_help = true
    )]
    pub tls_crl: Option<PathBuf>,
    /// The file with our token; or the variable `EMBERLINE_TOKEN` has the token itself. For `worker` it is the token that it joins by.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_TOKEN_FILE",
        value_name = "FILE",
        hide_short_help = true
    )]
    pub token_file: Option<PathBuf>,
}

/// The same, read.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// How connections are opened.
    pub dialer: Dialer,
    /// What is shown on them.
    pub token: Option<Token>,
}

impl Security {
    /// A request that shows the token.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Some(shown) = self.token.as_ref().and_then(Token::header) {
            let headers = request.metadata_mut().as_mut();
            headers.insert(header::AUTHORIZATION, shown);
        }
        request
    }
}

impl SecurityArguments {
    /// Reads what is named.
    ///
    /// # Errors
    /// [`Exit`] names the flag or the file.
    pub fn read(&self) -> Result<Security, Exit> {
        Ok(Security {
            dialer: Dialer::new(self.tls()?),
            token: self.token()?,
        })
    }

    fn tls(&self) -> Result<Option<Tls>, Exit> {
        let identity = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return Err(Exit::input("`--tls-cert` needs `--tls-key`")),
            (None, Some(_)) => return Err(Exit::input("`--tls-key` needs `--tls-cert`")),
        };
        let Some(ca) = &self.tls_ca else {
            if identity.is_some() || self.tls_crl.is_some() {
                return Err(Exit::input(
                    "`--tls-cert` and `--tls-crl` need `--tls-ca`: say who signed the certificates of the others",
                ));
            }
            return Ok(None);
        };
        install_crypto_provider();
        let files = TlsFiles {
            ca: ca.clone(),
            identity,
            revoked: self.tls_crl.clone(),
        };
        let tls = Tls::open(files).map_err(|e| Exit::input(format!("TLS: {e}")))?;
        Ok(Some(tls))
    }

    fn token(&self) -> Result<Option<Token>, Exit> {
        if let Some(path) = &self.token_file {
            return read_token(path).map(Some);
        }
        match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => match Token::parse(&text) {
                Ok(token) => Ok(Some(token)),
                Err(e) => Err(Exit::input(format!("`{TOKEN_VARIABLE}`: {e}"))),
            },
            _ => Ok(None),
        }
    }
}

/// Reads a file that has a token.
fn read_token(path: &Path) -> Result<Token, Exit> {
    let wrong = |why: &dyn std::fmt::Display| Exit::input(format!("`{}`: {why}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|e| wrong(&e))?.len();
    if bytes > 2 * MAX_TOKEN_BYTES as u64 {
        return Err(wrong(&"this is no token: it is too large"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| wrong(&e))?;
    Token::parse(&text).map_err(|e| wrong(&e))
}
