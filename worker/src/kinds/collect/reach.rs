//! What `collect` may reach: which addresses, and which files of this machine.
//!
//! A source stands in a pipeline file, and is fetched with the rights and from the place of the
//! worker. So addresses that mean something else to the worker than to whoever wrote the pipeline
//! are refused: the machine itself, its link, clouds' own services. Private networks are not, for
//! data lives there.

use std::{
    fmt,
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustix::fs::fstatfs;

/// Of `proc(5)`: a process's environment and memory look like files there.
const PROC: i64 = 0x9fa0;
/// Of `sysfs(5)`.
const SYS: i64 = 0x6265_6572;

/// See the module. By default nothing is allowed that would have to be, and nothing is kept out of
/// that need not be.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    loopback: bool,
    allowed: Vec<Allowed>,
    roots: Vec<PathBuf>,
    kept_out: Vec<PathBuf>,
}

/// A host or a network that may be reached although it would be refused: `name`, `10.1.2.3`,
/// `10.0.0.0/8`, `fd00::/8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// By this name, wherever it leads to.
    Host(String),
    /// These addresses: all with the same first bits, so many of them.
    Network(IpAddr, u8),
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("`{}` {why}", text.escape_debug());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address = address.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = address.parse::<IpAddr>() {
            let most = if address.is_ipv4() { 32 } else { 128 };
            let bits = match bits {
                None => most,
                Some(bits) => (bits.parse().ok().filter(|bits| *bits <= most))
                    .ok_or_else(|| wrong(&format!("must end in a number from 0 to {most}")))?,
            };
            let network = Self::Network(address, bits);
            if !network.has_address(masked(address, bits)) || masked(address, bits) != address {
                return Err(wrong(&format!(
                    "has bits beyond the first {bits}: write `{}/{bits}`",
                    masked(address, bits)
                )));
            }
            return Ok(network);
        }
        // As the host of a URL would be, so that the two can be compared.
        match url::Host::parse(text) {
            Ok(url::Host::Domain(name)) if bits.is_none() && !name.contains('*') => {
                Ok(Self::Host(name.trim_end_matches('.').to_owned()))
            }
            _ => Err(wrong("is neither a host, an address nor a network")),
        }
    }
}

impl Allowed {
    fn has_address(&self, address: IpAddr) -> bool {
        match self {
            Self::Host(_) => false,
            Self::Network(network, bits) => masked(address, *bits) == *network,
        }
    }

    fn has_name(&self, name: &str) -> bool {
        matches!(self, Self::Host(host) if host.eq_ignore_ascii_case(name.trim_end_matches('.')))
    }
}

/// The address with nothing but its first bits.
fn masked(address: IpAddr, bits: u8) -> IpAddr {
    let bits = u32::from(bits);
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX
                .checked_shl(32_u32.saturating_sub(bits))
                .unwrap_or(0);
            Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX
                .checked_shl(128_u32.saturating_sub(bits))
                .unwrap_or(0);
            Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    }
}

/// Why an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused(&'static str);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

const LOOPBACK: Refused = Refused("the worker's own machine");
const NOBODY: Refused = Refused("an address of nobody's");
const LINK: Refused = Refused("an address of the worker's own link");
const MANY: Refused = Refused("an address of many machines");
const CLOUD: Refused = Refused("where a cloud tells a machine its credentials");

impl Reach {
    /// For a worker on the machine of whoever wrote the pipeline: what serves there may be reached.
    #[must_use]
    pub fn of_own_machine() -> Self {
        Self {
            loopback: true,
            ..Self::default()
        }
    }

    /// This, too.
    #[must_use]
    pub fn allow(mut self, more: impl IntoIterator<Item = Allowed>) -> Self {
        self.allowed.extend(more);
        self
    }

    /// Files of this machine are taken only from below these directories, if there is one.
    #[must_use]
    pub fn below(mut self, roots: impl IntoIterator<Item = PathBuf>) -> Self {
        self.roots.extend(roots);
        self
    }

    /// No file is taken from below this directory.
    #[must_use]
    pub fn keep_out_of(mut self, dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        self.kept_out.extend(dirs);
        self
    }

    /// Whether a host of that name may be reached wherever it leads to.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.allowed.iter().any(|allowed| allowed.has_name(name))
    }

    /// Whether an address may be reached.
    pub(super) fn check(&self, address: IpAddr) -> Result<(), Refused> {
        if self.allowed.iter().any(|a| a.has_address(address)) {
            return Ok(());
        }
        // In whichever form it comes: it is the machine behind it that answers.
        let plain = within(address);
        if plain != address && self.allowed.iter().any(|a| a.has_address(plain)) {
            return Ok(());
        }
        match of_nobody_elses(plain) {
            Some(LOOPBACK) if self.loopback => Ok(()),
            Some(refused) => Err(refused),
            None => Ok(()),
        }
    }

    /// Whether what has been opened may be taken; `path` is how it was named. It is the file itself
    /// that is looked at: what stands under a name can change.
    pub(super) fn check_file(&self, file: &File, path: &Path) -> Result<(), String> {
        let refused = |why: String| Err(format!("`{}` is refused: {why}", path.display()));
        let is_system = fstatfs(file).is_ok_and(|of| {
            #[allow(clippy::useless_conversion, reason = "its width is the system's")]
            let kind = i64::from(of.f_type);
            matches!(kind, PROC | SYS)
        });
        if is_system {
            return refused("it is no file but the system's own".to_owned());
        }
        let real = match fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) {
            Ok(real) => real,
            // Without a way to know what it is, it is nothing that a rule could allow.
            Err(_) if self.roots.is_empty() && self.kept_out.is_empty() => return Ok(()),
            Err(e) => return refused(format!("it cannot be told where it is: {e}")),
        };
        let below = |dir: &PathBuf| {
            let dir = dir.canonicalize().unwrap_or_else(|_| dir.clone());
            real.starts_with(dir)
        };
        if let Some(dir) = self.kept_out.iter().find(|dir| below(dir)) {
            return refused(format!("`{}` is the worker's own", dir.display()));
        }
        if !self.roots.is_empty() && !self.roots.iter().any(below) {
            let roots = self
                .roots
                .iter()
                .map(|root| format!("`{}`", root.display()));
            let roots = roots.collect::<Vec<_>>().join(", ");
            return refused(format!("this worker takes files from below {roots} only"));
        }
        Ok(())
    }
}

/// The address of IPv4 that one of IPv6 stands for, if it does.
fn within(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let low = |word: u128| Ipv4Addr::from_bits(u32::try_from(word & 0xffff_ffff).unwrap_or(0));
    let bits = v6.to_bits();
    let parts = v6.segments();
    let v4 = match parts {
        // Mapped; and compatible, but for `::` and `::1`.
        [0, 0, 0, 0, 0, 0xffff, ..] => low(bits),
        [0, 0, 0, 0, 0, 0, high, _] if high != 0 => low(bits),
        // Translated by SIIT.
        [0, 0, 0, 0, 0xffff, 0, ..] => low(bits),
        // NAT64, well known and of one's own network.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 1, ..] => low(bits),
        // 6to4.
        [0x2002, ..] => low(bits >> 80),
        // Teredo: turned round.
        [0x2001, 0, ..] => low(!bits),
        // ISATAP.
        [.., 0 | 0x200, 0x5efe, _, _] => low(bits),
        _ => return address,
    };
    v4.into()
}

/// Why an address means something else to each machine, if it does.
fn of_nobody_elses(address: IpAddr) -> Option<Refused> {
    match address {
        IpAddr::V4(address) => {
            let [first, second, third, _] = address.octets();
            match (first, second, third) {
                (0, ..) => Some(NOBODY),
                (127, ..) => Some(LOOPBACK),
                // AWS, Azure, Google and others tell credentials at 169.254.169.254 and .170.2.
                (169, 254, _) => Some(LINK),
                // Oracle's, of old; and what is set apart beside it.
                (192, 0, 0) => Some(CLOUD),
                (224..=239, ..) => Some(MANY),
                (255, 255, 255) if address.is_broadcast() => Some(MANY),
                (240..=255, ..) => Some(NOBODY),
                // Azure's wire server; Alibaba's.
                _ if address == Ipv4Addr::new(168, 63, 129, 16) => Some(CLOUD),
                _ if address == Ipv4Addr::new(100, 100, 100, 200) => Some(CLOUD),
                _ => None,
            }
        }
        IpAddr::V6(address) => {
            const CLOUDS: [Ipv6Addr; 3] = [
                // AWS, Google, Oracle.
                Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
                Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
                Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
            ];
            if address.is_loopback() {
                Some(LOOPBACK)
            } else if address.is_unspecified() {
                Some(NOBODY)
            } else if address.is_multicast() {
                Some(MANY)
            } else if address.segments()[0] & 0xff80 == 0xfe80 {
                // Of the link, and of the site as it was once called.
                Some(LINK)
            } else if CLOUDS.contains(&address) {
                Some(CLOUD)
            } else {
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn may(reach: &Reach, address: &str) -> bool {
        reach.check(address.parse().unwrap()).is_ok()
    }

    /// Each with the forms of IPv6 that lead to the same machine.
    fn forms(v4: &str) -> Vec<String> {
        let [a, b, c, d] = v4.parse::<Ipv4Addr>().unwrap().octets();
        let hex = format!("{a:02x}{b:02x}:{c:02x}{d:02x}");
        let turned = format!("{:02x}{:02x}:{:02x}{:02x}", !a, !b, !c, !d);
        vec![
            v4.to_owned(),
            format!("::ffff:{v4}"),
            format!("::ffff:0:{v4}"),
            format!("64:ff9b::{v4}"),
            format!("64:ff9b:1::{v4}"),
            format!("2002:{hex}::1"),
            format!("2001:0:4136:e378:8000:63bf:{turned}"),
            format!("2606:2800::5efe:{hex}"),
            format!("2606:2800::200:5efe:{hex}"),
        ]
    }

    #[test]
    fn the_machine_its_link_and_clouds_services_are_refused_in_every_form() {
        let reach = Reach::default();
        for refused in [
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "169.254.170.2",
            "0.0.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            for form in forms(refused) {
                assert!(!may(&reach, &form), "{form}");
            }
        }
        for refused in [
            "0.0.0.0",
            "::",
            "::1",
            "::7f00:1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
        ] {
            assert!(!may(&reach, refused), "{refused}");
        }
        for allowed in [
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "93.184.216.34",
        ] {
            for form in forms(allowed) {
                assert!(may(&reach, &form), "{form}");
            }
        }
        for allowed in ["fd12:3456::1", "2606:2800::1"] {
            assert!(may(&reach, allowed), "{allowed}");
        }
    }

    #[test]
    fn ones_own_machine_reaches_itself_and_nothing_else_more() {
        let reach = Reach::of_own_machine();
        for allowed in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(may(&reach, allowed), "{allowed}");
        }
        for refused in ["169.254.169.254", "0.0.0.0", "fe80::1"] {
            assert!(!may(&reach, refused), "{refused}");
        }
    }

    #[test]
    fn what_is_allowed_is_and_its_neighbours_are_not() {
        let allowed = ["127.0.0.1", "169.254.0.0/17", "fe80::/64", "Data.Example."];
        let reach = Reach::default().allow(allowed.map(|text| text.parse().unwrap()));
        for allowed in ["127.0.0.1", "::ffff:127.0.0.1", "169.254.1.1", "fe80::9"] {
            assert!(may(&reach, allowed), "{allowed}");
        }
        for refused in ["127.0.0.2", "169.254.169.254", "fe80:0:0:1::9"] {
            assert!(!may(&reach, refused), "{refused}");
        }
        assert!(reach.knows("data.example") && reach.knows("DATA.example."));
        assert!(!reach.knows("other.data.example") && !reach.knows("example"));
    }

    #[test]
    fn what_is_no_host_and_no_network_is_refused() {
        for (text, part) in [
            ("10.0.0.1/8", "write `10.0.0.0/8`"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("fd00::/129", "from 0 to 128"),
            ("10.0.0.0/", "from 0 to 32"),
            ("*.example", "neither a host"),
            ("a b", "neither a host"),
            ("a/8", "neither a host"),
            ("", "neither a host"),
            ("http://x", "neither a host"),
        ] {
            let error = text.parse::<Allowed>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let every = "0.0.0.0/0".parse::<Allowed>().unwrap();
        assert!(every.has_address("127.0.0.1".parse().unwrap()));
        assert!(!every.has_address("::1".parse().unwrap()));
    }

    #[test]
    fn files_are_taken_from_where_they_may_be_whatever_leads_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["data", "own"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("x"), "1").unwrap();
        }
        std::os::unix::fs::symlink(at("own"), at("data/link")).unwrap();
        let check = |reach: &Reach, path: &Path| {
            let file = File::open(path).unwrap();
            reach.check_file(&file, path)
        };
        let own = Reach::default().keep_out_of([at("own")]);
        assert!(check(&own, &at("data/x")).is_ok());
        for path in ["own/x", "data/../own/x", "data/link/x"] {
            let error = check(&own, &at(path)).unwrap_err();
            assert!(error.contains("is the worker's own"), "{error}");
        }
        let rooted = Reach::default().below([at("data")]);
        assert!(check(&rooted, &at("data/x")).is_ok());
        for path in ["own/x", "data/../own/x", "data/link/x"] {
            let error = check(&rooted, &at(path)).unwrap_err();
            assert!(error.contains("takes files from below"), "{error}");
        }
        for path in ["/proc/self/environ", "/proc/self/status", "/proc/1/cmdline"] {
            let error = check(&Reach::of_own_machine(), path.as_ref()).unwrap_err();
            assert!(error.contains("the system's own"), "{error}");
        }
    }
}
