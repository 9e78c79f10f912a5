//! Opening a bucket: what the environment says about where it is and who asks.
//!
//! Nothing here is a default that a server has to agree with: path-style addresses (every server
//! takes them), no conditional writes, no tags.

use std::{sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut},
};

use super::{
    Patience, credentials_file,
    patience::{PatientConnector, Traffic},
};

/// The names of an endpoint, the one that counts first.
const ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
/// What says where credentials come from; without any of them, it is the machine's own in AWS.
const CREDENTIALS: [&str; 5] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];

/// The `AWS_…` variables that say how to reach S3. [docs/guide/storage.md] lists them.
///
/// [docs/guide/storage.md]: https://github.com/emberline/emberline/blob/main/docs/guide/storage.md
#[derive(Clone, PartialEq, Eq)]
pub struct Environment(Vec<(String, String)>);

impl std::fmt::Debug for Environment {
    /// Names alone: the values are secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|v| &v.0)).finish()
    }
}

impl Environment {
    /// The process's own.
    #[must_use]
    pub fn of_process() -> Self {
        let all = std::env::vars_os();
        let text = all.filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Self::new(text)
    }

    /// These variables; what does not begin with `AWS_` or is empty does not count.
    #[must_use]
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let all = variables.into_iter();
        Self(
            all.filter(|(k, v)| k.starts_with("AWS_") && !v.is_empty())
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The endpoint, if it is not AWS's own.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        ENDPOINTS.iter().find_map(|name| self.get(name))
    }

    /// The host that is asked, without a port.
    pub(super) fn address(&self) -> String {
        let endpoint = self.endpoint().and_then(|e| url::Url::parse(e).ok());
        if let Some(host) = endpoint.as_ref().and_then(url::Url::host_str) {
            return host.trim_matches(['[', ']']).to_owned();
        }
        let region = self.get("AWS_REGION").or(self.get("AWS_DEFAULT_REGION"));
        format!("s3.{}.amazonaws.com", region.unwrap_or("us-east-1"))
    }

    /// With the keys of the file that it names, if it has none itself.
    fn with_credentials_file(&self) -> Result<Self, String> {
        let mut all = self.clone();
        if let Some(path) = self.get("AWS_SHARED_CREDENTIALS_FILE")
            && !CREDENTIALS.iter().any(|name| self.get(name).is_some())
        {
            let profile = self.get("AWS_PROFILE").unwrap_or("default");
            all.0.extend(credentials_file::read(path, profile)?);
        }
        Ok(all)
    }

    /// Finds what cannot be meant, before anything is sent.
    fn check(&self) -> Result<(), String> {
        if let Some((name, endpoint)) = ENDPOINTS.iter().find_map(|n| Some((n, self.get(n)?))) {
            let is_url = url::Url::parse(endpoint)
                .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
            if !is_url {
                return Err(format!(
                    "{name} is `{endpoint}`; write it with `http://` or `https://` and a host"
                ));
            }
            let is_anonymous = self.get("AWS_SKIP_SIGNATURE").is_some_and(|v| v != "false");
            if !is_anonymous && !CREDENTIALS.iter().any(|name| self.get(name).is_some()) {
                return Err(format!(
                    "{name} is set and no credentials are; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE, or AWS_SKIP_SIGNATURE=true for a bucket that is open to all"
                ));
            }
        }
        for (one, other) in [(0, 1), (1, 0)].map(|(a, b)| (CREDENTIALS[a], CREDENTIALS[b])) {
            if self.get(one).is_some() && self.get(other).is_none() {
                return Err(format!("{one} is set and {other} is not"));
            }
        }
        Ok(())
    }
}

/// A bucket as it was opened.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    pub store: Arc<AmazonS3>,
    pub traffic: Arc<Traffic>,
}

/// Opens the bucket of an `s3://bucket/…` URL, whatever key comes after it.
///
/// # Errors
/// In one line, what is wrong with the URL or the environment.
pub(super) fn open_bucket(
    url: &str,
    environment: &Environment,
    patience: Patience,
    conditional: S3ConditionalPut,
) -> Result<Bucket, String> {
    crate::tls::install_crypto_provider();
    let environment = &environment.with_credentials_file()?;
    environment.check()?;
    let mut options = ClientOptions::new()
        .with_allow_http(
            environment
                .endpoint()
                .is_some_and(|e| e.starts_with("http:")),
        )
        .with_connect_timeout(patience.connect)
        .with_timeout_disabled();
    if let Some(path) = environment.get("AWS_CA_BUNDLE") {
        let failed = |why: &dyn std::fmt::Display| {
            format!("AWS_CA_BUNDLE names `{path}`, which cannot be used: {why}")
        };
        let pem = std::fs::read(path).map_err(|e| failed(&e))?;
        for certificate in Certificate::from_pem_bundle(&pem).map_err(|e| failed(&e))? {
            options = options.with_root_certificate(certificate);
        }
    }
    let traffic = Arc::new(Traffic::default());
    let mut builder = AmazonS3Builder::new()
        .with_client_options(options)
        .with_retry(RetryConfig {
            max_retries: patience.retries,
            retry_timeout: patience.budget,
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(5),
                // Each pause is between the first and three times the last one, by chance.
                base: 3.0,
            },
        })
        .with_http_connector(PatientConnector {
            patience,
            traffic: Arc::clone(&traffic),
        });
    for (name, value) in &environment.0 {
        // Other tools' variables begin so, too.
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let built = builder.with_url(url).with_conditional_put(conditional);
    let store = built.build().map_err(|e| e.to_string())?;
    Ok(Bucket {
        store: Arc::new(store),
        traffic,
    })
}

/// The bucket that an `s3://bucket/…` URL names, whatever key comes after it; region, endpoint and
/// credentials come from the usual `AWS_…` environment.
///
/// # Errors
/// If the URL or the environment cannot be used.
pub fn open_s3(url: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    let opened = open_bucket(
        url,
        &Environment::of_process(),
        Patience::default(),
        S3ConditionalPut::Disabled,
    );
    let bucket = opened.map_err(|why| object_store::Error::Generic {
        store: "S3",
        source: why.into(),
    })?;
    Ok(bucket.store)
}
