//! Addresses of coordinators, as people, configurations and followers write them: `host:port`, or the
//! same as a URL. An address without a port is a mistake that nobody would notice otherwise: it would
//! be tried at a port that was never meant, for ever.

use http::uri::Authority;

/// Whether a text is `host:port`, with a port that can be connected to.
#[must_use]
pub fn is_host_port(text: &str) -> bool {
    authority(text).is_ok()
}

/// Splits the address of a process, `host:port` or a URL of one, into the scheme, if it has one, and
/// `host:port`.
///
/// # Errors
/// What is wrong with it, in one line.
pub fn split_address(address: &str) -> Result<(Option<&str>, &str), String> {
    let wrong = |why: &str| {
        format!(
            "`{address}` is no address: {why}; write `host:port`, `http://host:port` or `https://host:port`"
        )
    };
    let (scheme, bare) = match address.split_once("://") {
        None => (None, address),
        Some((scheme @ ("http" | "https"), rest)) => {
            (Some(scheme), rest.strip_suffix('/').unwrap_or(rest))
        }
        Some(_) => return Err(wrong("only `http:` and `https:` are known")),
    };
    authority(bare).map_err(wrong)?;
    Ok((scheme, bare))
}

fn authority(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let Ok(authority) = text.parse::<Authority>() else {
        return Err("it is not `host:port`");
    };
    if authority.host().is_empty() || text.contains('@') {
        return Err("it names no host");
    }
    match authority.port_u16() {
        Some(port) if port > 0 => Ok(()),
        _ => Err("it needs a port from 1 to 65535"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (address, url) in [
            ("127.0.0.1:7420", (None, "127.0.0.1:7420")),
            ("c1.example:1", (None, "c1.example:1")),
            ("[::1]:65535", (None, "[::1]:65535")),
            ("http://a:1", (Some("http"), "a:1")),
            ("https://a:1/", (Some("https"), "a:1")),
        ] {
            assert_eq!(split_address(address).unwrap(), url);
        }
    }

    #[test]
    fn what_is_wrong_with_one_is_told() {
        for (address, why) in [
            ("", "is empty"),
            ("http://", "is empty"),
            ("127.0.0.1", "needs a port"),
            ("http://127.0.0.1", "needs a port"),
            ("a:", "needs a port"),
            ("a:0", "needs a port"),
            ("a:99999", "needs a port"),
            ("::1", "not `host:port`"),
            (":7420", "no host"),
            ("me@a:1", "no host"),
            ("a b:1", "not `host:port`"),
            ("a:1/b", "not `host:port`"),
            ("ftp://a:1", "only `http:`"),
            ("http://http://a:1", "not `host:port`"),
        ] {
            let told = split_address(address).unwrap_err();
            assert!(told.contains(why), "{told}");
            assert!(told.starts_with(&format!("`{address}` is no address")));
        }
        assert!(is_host_port("a:1"));
        assert!(!is_host_port("http://a:1"));
    }
}
