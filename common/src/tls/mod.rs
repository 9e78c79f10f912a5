//! TLS between the parts of a cluster, by certificates of the cluster's own authority.
//!
//! Both ends show a certificate: a port that speaks TLS takes no connection without one. Only TLS 1.3
//! is spoken, and no session is resumed, so that every connection is checked in full. The files are
//! looked at again as connections are made, and taken up when they have changed ([`Tls`]); connections
//! that are open stay. What a certificate says of its owner is in [`peer`], the client's side in
//! [`dial`].

pub mod dial;
mod files;
pub mod peer;
mod stream;

pub use self::{
    dial::Dialer,
    files::{Tls, TlsError, TlsFiles},
    peer::{CertificateRole, Facts, Identity},
    stream::{Peer, Refusals, Wire},
};

/// Makes *ring* the process's provider; a call after the first does nothing. Whatever opens HTTPS
/// calls it before, so that no order of start-up matters.
pub fn install_crypto_provider() {
    // Fails only where a provider is there already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
