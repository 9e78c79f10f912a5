//! The one place that chooses the cryptography of TLS.

/// Makes *ring* the process's provider; a call after the first does nothing. Whatever opens HTTPS
/// calls it before, so that no order of start-up matters.
pub fn install_crypto_provider() {
    // Fails only where a provider is there already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
