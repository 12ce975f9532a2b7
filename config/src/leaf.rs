//! The values that stand at the ends of the tree: names, addresses, numbers with bounds, durations,
//! words from a list, server IDs and keys.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use quic::routable::{ConfigId, Key, MAX_SERVER_ID_LEN, ServerId};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use zeroize::Zeroizing;

use crate::{
    checked::{
        Admission, Admittance, HashBy, HonoursTokens, LogFormat, LogLevel, RetryMode, TokenFormat,
        UnknownPackets,
    },
    mistake::{Mistakes, Place},
    read::{At, Read, join, place_of},
    slips::closest,
    units::{display_duration, guess_duration, largest_unit, parse_config_id, parse_duration},
    yaml::{Content, Node, shown},
};

/// A schema without a name of its own.
macro_rules! inline_schema {
    (($($generics:tt)*) $type:ty, |$generator:ident| $schema:expr) => {
        impl<$($generics)*> JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema($generator: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}

/// A name that fits a metric label, a log line and a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name(pub(crate) String);

const MAX_NAME_LEN: usize = 63;

impl Read for Name {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "1 to 63 letters, digits, '-', '_' or '.', the first a letter or digit";
        let text = text(node, place, expected, mistakes)?;
        let fits = text.len() <= MAX_NAME_LEN
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if !fits {
            mistakes.error(place, node.describe(), expected);
            return None;
        }
        Some(Self(text.to_owned()))
    }
}

inline_schema!(() Name, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
}));

/// The name of a host, as it stands in a URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostName(pub(crate) String);

const MAX_HOST_NAME_LEN: usize = 253;

impl Read for HostName {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "the name of a host, without a port";
        let text = text(node, place, expected, mistakes)?;
        let fits = text.len() <= MAX_HOST_NAME_LEN
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if !fits {
            mistakes.error(place, node.describe(), expected);
            return None;
        }
        Some(Self(text.trim_end_matches('.').to_ascii_lowercase()))
    }
}

inline_schema!(() HostName, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$",
}));

/// Any text but the empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Text(pub(crate) String);

impl Read for Text {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let text = text(node, place, "text", mistakes)?;
        if text.is_empty() {
            mistakes.error(place, "an empty text", "text, or the key left out");
            return None;
        }
        Some(Self(text.to_owned()))
    }
}

inline_schema!(() Text, |_generator| json_schema!({ "type": "string", "minLength": 1 }));

/// An IP address and a port that one host can be reached at, or listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    /// The network interface of a link-local address, by its name, until that is looked up.
    pub(crate) interface: Option<String>,
}

impl Read for Endpoint {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "\"IP:port\" or \"[IPv6]:port\"";
        let text = text(node, place, expected, mistakes)?;
        let found = || format!("\"{}\"", shown(text));
        let Some((address, interface)) = endpoint(text) else {
            let (found, expected) = misread_endpoint(text, &found(), expected);
            mistakes.error(place, found, expected);
            return None;
        };
        if address.port() == 0 {
            mistakes.error(place, format!("{}, port 0", found()), PORTS);
            return None;
        }
        let interface = interface.map(str::to_owned);
        is_of_one_host(address.ip(), place, mistakes).then_some(Self { address, interface })
    }
}

inline_schema!(() Endpoint, |_generator| json_schema!({
    "type": "string",
    "pattern": "^([0-9.]+|\\[[0-9A-Fa-f:.]+(%[0-9A-Za-z._@-]+)?\\]):[0-9]{1,5}$",
}));

const PORTS: &str = "a port from 1 to 65535";

/// An address, and the name behind its `%` if that is not a number.
fn endpoint(text: &str) -> Option<(SocketAddr, Option<&str>)> {
    if let Ok(address) = text.parse() {
        return Some((address, None));
    }
    let (host, port) = text.strip_prefix('[')?.split_once("]:")?;
    let (host, interface) = host.split_once('%')?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '@' | '-');
    // A longer one is no interface.
    if interface.is_empty() || interface.len() > 15 || !interface.chars().all(fits) {
        return None;
    }
    let address = format!("[{host}]:{port}").parse().ok()?;
    Some((address, Some(interface)))
}

/// What is wrong with the text of an endpoint, and what would do.
fn misread_endpoint(text: &str, found: &str, expected: &str) -> (String, String) {
    let unbracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = |text: &str| {
        let (host, _) = text.split_once('%').unwrap_or((text, ""));
        host.parse::<IpAddr>().ok()
    };
    let head_and_port = text.rsplit_once(':').filter(|(_, port)| is_digits(port));
    if let Some((host, port)) = head_and_port {
        let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if let Some(ip) = address(inside.unwrap_or(host)) {
            if ip.is_ipv6() && inside.is_none() {
                let found = format!("{found}, an IPv6 address without brackets");
                return (found, format!("\"[{}]:{port}\"", shown(host)));
            }
            if port.parse::<u16>().is_err() {
                return (format!("{found}, port {}", shown(port)), PORTS.to_owned());
            }
        }
    }
    if address(unbracketed.unwrap_or(text)).is_some() {
        return (format!("{found}, which has no port"), expected.to_owned());
    }
    if looks_like_host_name(text) {
        return (format!("the host name {found}"), format!("{expected}; names are not resolved"));
    }
    (found.to_owned(), expected.to_owned())
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// An IP address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) IpAddr);

impl Read for Address {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "an IP address without a port";
        let text = text(node, place, expected, mistakes)?;
        let host = text.split_once('%').map_or(text, |(host, _)| host);
        let Ok(address) = host.parse::<IpAddr>() else {
            mistakes.error(place, node.describe(), expected);
            return None;
        };
        if is_link_local(address) {
            let found =
                format!("the link-local address {address}, from which one link alone is reached");
            let expected = "an address that all backends of the pool are reached from, or none: \
                            towards link-local backends the kernel takes that of their link";
            mistakes.error(place, found, expected);
            return None;
        }
        if host != text {
            mistakes.error(place, node.describe(), format!("\"{address}\", without a zone"));
            return None;
        }
        if address.is_unspecified() {
            mistakes.error(place, format!("the unspecified address {address}"), "a local address");
            return None;
        }
        is_of_one_host(address, place, mistakes).then_some(Self(address))
    }
}

inline_schema!(() Address, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[0-9A-Fa-f.:]+$",
}));

/// Whether the address means another host on each link (fe80::/10), so that it needs to be said
/// which link.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// A whole number within bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count<const MIN: u32, const MAX: u32>(pub(crate) u32);

impl<const MIN: u32, const MAX: u32> Read for Count<MIN, MAX> {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let plain_digits = |text: &&str| {
            text.bytes().all(|b| b.is_ascii_digit()) && (*text == "0" || !text.starts_with('0'))
        };
        let number = node.number().filter(plain_digits).and_then(|text| text.parse().ok());
        let within = number.filter(|number| (MIN..=MAX).contains(number));
        if within.is_none() && !matches!(node.content, Content::Broken) {
            let quoted = node.text().is_some_and(|text| plain_digits(&text) && !text.is_empty());
            let hint = if quoted { ", without quotes" } else { "" };
            let expected = format!("a whole number from {MIN} to {MAX}{hint}");
            mistakes.error(place, node.describe(), expected);
        }
        within.map(Self)
    }
}

inline_schema!((const MIN: u32, const MAX: u32) Count<MIN, MAX>, |_generator| json_schema!({
    "type": "integer",
    "minimum": MIN,
    "maximum": MAX,
}));

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flag(pub(crate) bool);

impl Read for Flag {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let flag = node.boolean();
        if flag.is_none() && !matches!(node.content, Content::Broken) {
            let quoted = node.text().is_some_and(|text| matches!(text, "true" | "false"));
            let hint = if quoted { ", without quotes" } else { "" };
            mistakes.error(place, node.describe(), format!("true or false{hint}"));
        }
        flag.map(Self)
    }
}

inline_schema!(() Flag, |_generator| json_schema!({ "type": "boolean" }));

impl Read for HonoursTokens {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        if node.text() == Some("probe") {
            return Some(Self::Probe);
        }
        if node.boolean().is_none() && !matches!(node.content, Content::Broken) {
            let quoted = node.text().is_some_and(|text| matches!(text, "true" | "false"));
            let expected =
                if quoted { "true or false, without quotes" } else { "true, false or \"probe\"" };
            mistakes.error(place, node.describe(), expected);
        }
        node.boolean().map(|honours| if honours { Self::Yes } else { Self::No })
    }
}

inline_schema!(() HonoursTokens, |_generator| json_schema!({ "enum": [true, false, "probe"] }));

/// A duration within bounds, which are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval<const MIN: u64, const MAX: u64>(pub(crate) Duration);

impl<const MIN: u64, const MAX: u64> Read for Interval<MIN, MAX> {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
        let duration = node.text().and_then(|text| parse_duration(text).ok());
        let within = duration.filter(|duration| (min..=max).contains(duration));
        if within.is_none() && !matches!(node.content, Content::Broken) {
            let expected = format!(
                "a duration with its unit (ms, s, m or h) from \"{}\" to \"{}\"",
                display_duration(min),
                display_duration(max)
            );
            let found = match node.number() {
                Some(number) => format!("{}, which has no unit", shown(number)),
                None => node.describe(),
            };
            let meant = node.text().filter(|_| duration.is_none()).and_then(guess_duration);
            let meant = meant.filter(|meant| (min..=max).contains(meant));
            let expected = match meant {
                Some(meant) => {
                    let meant = largest_unit(meant);
                    format!("\"{meant}\", if that is meant: {expected}")
                }
                None => expected,
            };
            mistakes.error(place, found, expected);
        }
        within.map(Self)
    }
}

inline_schema!((const MIN: u64, const MAX: u64) Interval<MIN, MAX>, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[0-9]+(ms|s|m|h)$",
}));

/// A share of a whole, from 0% to 100%.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Percent(pub(crate) u8);

impl Read for Percent {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let digits = node.text().and_then(|text| text.strip_suffix('%'));
        let digits = digits.filter(|digits| digits.len() <= 3 && is_digits(digits));
        let percent = digits.and_then(|digits| digits.parse().ok()).filter(|n| *n <= 100);
        if percent.is_none() && !matches!(node.content, Content::Broken) {
            let found = match node.number() {
                Some(number) => format!("{}, which has no %", shown(number)),
                None => node.describe(),
            };
            mistakes.error(place, found, "a share from \"0%\" to \"100%\"");
        }
        percent.map(Self)
    }
}

inline_schema!(() Percent, |_generator| json_schema!({
    "type": "string",
    "pattern": "^(100|[0-9]{1,2})%$",
}));

/// A share of a whole, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) millionths: u32,
}

impl Share {
    fn parse(number: &str) -> Option<Self> {
        const DECIMALS: usize = 6;
        let (whole, decimals) = number.split_once('.').unwrap_or((number, "0"));
        let whole = match whole {
            "0" => 0,
            "1" => 1_000_000,
            _ => return None,
        };
        if !(1..=DECIMALS).contains(&decimals.len()) || !is_digits(decimals) {
            return None;
        }
        let decimals: u32 = format!("{decimals:0<DECIMALS$}").parse().ok()?;
        Some(whole + decimals).filter(|n| *n <= 1_000_000).map(|millionths| Self { millionths })
    }
}

impl Read for Share {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let share = node.number().and_then(Self::parse);
        if share.is_none() && !matches!(node.content, Content::Broken) {
            mistakes.error(place, node.describe(), "a number from 0 to 1, such as 0.01");
        }
        share
    }
}

inline_schema!(() Share, |_generator| json_schema!({
    "type": "number",
    "minimum": 0,
    "maximum": 1,
}));

/// What a check asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckWord {
    Http3,
    Quic,
    VersionNegotiation,
}

/// Which certificates are good, where no others are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CertificateWord {
    Ignored,
}

/// A type of which each value has a word of its own.
macro_rules! words {
    ($vis:vis $type:ty: $($word:literal => $value:ident),*) => {
        impl $type {
            /// The word for it in the file.
            #[must_use]
            $vis const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$value => $word),*
                }
            }
        }

        impl Read for $type {
            fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
                let words = [$($word),*];
                let expected = format!("one of \"{}\"", words.join("\", \""));
                match text(node, place, &expected, mistakes)? {
                    $($word => Some(Self::$value),)*
                    other => {
                        let expected = match closest(other, words) {
                            Some(word) => {
                                format!("\"{word}\", if that is meant; otherwise {expected}")
                            }
                            None => expected,
                        };
                        mistakes.error(place, node.describe(), expected);
                        None
                    }
                }
            }
        }

        inline_schema!(() $type, |_generator| json_schema!({
            "type": "string",
            "enum": [$($word),*],
        }));
    };
}

words!(pub Admission: "active" => Active, "draining" => Draining);
words!(pub LogLevel:
    "error" => Error, "warn" => Warn, "info" => Info, "debug" => Debug, "trace" => Trace);
words!(pub LogFormat: "text" => Text, "json" => Json);

words!(pub RetryMode: "off" => Off, "always" => Always, "adaptive" => Adaptive);
words!(pub TokenFormat: "nat" => Nat, "shared_state" => SharedState);
words!(pub HashBy:
    "client_address" => ClientAddress,
    "client_address_and_port" => ClientAddressAndPort,
    "dcid" => Dcid);
words!(pub Admittance: "allow" => Allow, "deny" => Deny);
words!(pub(crate) CheckWord:
    "http3" => Http3, "quic" => Quic, "version_negotiation" => VersionNegotiation);
words!(pub(crate) CertificateWord: "ignored" => Ignored);
words!(pub UnknownPackets: "forward" => Forward, "refuse" => Refuse);

/// The number of a QUIC version as it is on the wire, in hex behind `0x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WireVersion(pub(crate) u32);

impl Read for WireVersion {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "\"0x\" and eight hex digits";
        let digits = hex(node, place, expected, mistakes)?.strip_prefix("0x");
        let octets = digits.and_then(octets).and_then(|octets| octets.try_into().ok());
        let version = octets.map(u32::from_be_bytes);
        if version.is_none() {
            mistakes.error(place, node.describe(), expected);
        }
        version.map(Self)
    }
}

inline_schema!(() WireVersion, |_generator| json_schema!({
    "type": "string",
    "pattern": "^0x[0-9A-Fa-f]{8}$",
}));

/// What the unique number of a token is combined with into its nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TokenIv(pub(crate) [u8; 12]);

impl Read for TokenIv {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "24 hex digits";
        let text = hex(node, place, expected, mistakes)?;
        let iv = octets(text).and_then(|octets| octets.try_into().ok());
        if iv.is_none() {
            // Someone may have put the key here: it is not shown.
            let found = format!("{} characters", text.chars().count());
            mistakes.error(place, found, digits_alone(text, expected));
        }
        iv.map(Self)
    }
}

inline_schema!(() TokenIv, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[0-9A-Fa-f]{24}$",
}));

/// A server ID in hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(pub(crate) ServerId);

impl Read for Identity {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "two hex digits for each byte that server_id_length says";
        let text = hex(node, place, expected, mistakes)?;
        let server_id = octets(text).and_then(|octets| ServerId::new(&octets));
        if server_id.is_none() {
            let found = match text.len() {
                _ if !text.bytes().all(|b| b.is_ascii_hexdigit()) => node.describe(),
                0 => "an empty text".to_owned(),
                digits if digits % 2 == 1 => format!("an odd number of hex digits, {digits}"),
                digits => format!("{digits} hex digits, more than {}", 2 * MAX_SERVER_ID_LEN),
            };
            let plain = without_separators(text).filter(|plain| octets(plain).is_some());
            let expected = match plain {
                Some(plain) => format!("\"{}\", if that is meant: {expected}", shown(&plain)),
                None => expected.to_owned(),
            };
            mistakes.error(place, found, expected);
        }
        server_id.map(Self)
    }
}

inline_schema!(() Identity, |_generator| json_schema!({
    "type": "string",
    "pattern": "^([0-9A-Fa-f]{2}){1,15}$",
}));

/// A value for each of several config IDs.
#[derive(Clone, Debug)]
pub(crate) struct PerConfig<T> {
    pub(crate) entries: Vec<(ConfigId, At<T>)>,
    /// Whether the file has more entries, reported as wrong.
    pub(crate) incomplete: bool,
}

impl<T: Read> Read for PerConfig<T> {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "a mapping from config IDs, such as { 0: \"0001\", 1: \"a1b2c3\" }";
        let nodes = match &node.content {
            Content::Mapping(nodes) => nodes,
            Content::Broken => return None,
            _ => {
                mistakes.error(place, node.describe(), expected);
                return None;
            }
        };
        let mut entries: Vec<(ConfigId, At<T>)> = Vec::with_capacity(nodes.len());
        for (key, value) in nodes.iter() {
            let text = match &key.content {
                Content::Scalar { text, .. } => text.as_str(),
                _ => "",
            };
            let key_place = Place { path: join(&place.path, &shown(text)), ..place_of(key) };
            let Ok(id) = parse_config_id(text) else {
                let found = format!("{} as a key", key.describe());
                mistakes.error(&key_place, found, "a config ID from 0 to 6");
                continue;
            };
            if let Some((_, first)) = entries.iter().find(|(given, _)| *given == id) {
                mistakes.error(&key_place, format!("config ID {id} again"), "each config ID once");
                mistakes.see_also(&first.place);
                continue;
            }
            let place = Place { path: key_place.path, ..place_of(value) };
            if let Some(value) = T::read(value, &place, mistakes) {
                entries.push((id, At { value, place }));
            }
        }
        Some(Self { incomplete: entries.len() < nodes.len(), entries })
    }
}

inline_schema!((T: JsonSchema) PerConfig<T>, |generator| json_schema!({
    "type": "object",
    "patternProperties": { "^[0-6]$": generator.subschema_for::<T>() },
    "additionalProperties": false,
}));

/// The bytes of a key. They are never printed, and end with it; they are in one place, wherever it is moved.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(Rc<Zeroizing<[u8; 16]>>);

impl Secret {
    /// What a key has to be; for reports.
    pub(crate) const EXPECTED: &str = "32 hex digits";

    /// Takes 32 hex digits. `Err` says what was found without showing it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let octets = octets(text).map(Zeroizing::new);
        if let Some(key) = octets.and_then(|octets| octets[..].try_into().ok()) {
            return Ok(Self(Rc::new(Zeroizing::new(key))));
        }
        let length = text.chars().count();
        match text.chars().position(|c| !c.is_ascii_hexdigit()) {
            _ if length == 0 => Err("no characters".to_owned()),
            None => Err(format!("{length} hex digits")),
            Some(nth) => {
                Err(format!("{length} characters, of which number {} is no hex digit", nth + 1))
            }
        }
    }

    pub(crate) fn key(&self) -> Key {
        Key::new(self.octets())
    }

    pub(crate) fn octets(&self) -> [u8; 16] {
        **self.0
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.octets() == [0; 16]
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(masked)")
    }
}

impl Read for Secret {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let Some(text) = node.text().or_else(|| node.number()) else {
            if !matches!(node.content, Content::Broken) {
                mistakes.error(place, node.kind(), format!("{}, in quotes", Self::EXPECTED));
            }
            return None;
        };
        Self::parse(text)
            .map_err(|found| mistakes.error(place, found, digits_alone(text, Self::EXPECTED)))
            .ok()
    }
}

inline_schema!(() Secret, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[0-9A-Fa-f]{32}$",
}));

/// The text of a node that means text, or a mistake.
fn text<'a>(
    node: &'a Node,
    place: &Place,
    expected: &str,
    mistakes: &mut Mistakes,
) -> Option<&'a str> {
    let text = node.text();
    if text.is_none() && !matches!(node.content, Content::Broken) {
        let is_scalar = node.number().is_some() || node.kind() == "a truth value";
        let hint = if is_scalar { ", in quotes" } else { "" };
        mistakes.error(place, node.describe(), format!("{expected}{hint}"));
    }
    text
}

/// The text of a node that means hex digits. Unquoted they may look like a number, and are taken as
/// they were typed: `0008` and `12e3` are what programs write that know other numbers.
fn hex<'a>(
    node: &'a Node,
    place: &Place,
    expected: &str,
    mistakes: &mut Mistakes,
) -> Option<&'a str> {
    node.number().or_else(|| text(node, place, expected, mistakes))
}

/// What `text` comes to without the forms that hex digits have elsewhere: `0x0008`, `00:08`.
fn without_separators(text: &str) -> Option<String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let plain: String =
        digits.chars().filter(|c| !matches!(c, ':' | '-' | '_' | '.' | ' ')).collect();
    let is_hex = !plain.is_empty() && plain.chars().all(|c| c.is_ascii_hexdigit());
    (is_hex && plain != text).then_some(plain)
}

/// What is expected of digits that must not be shown.
fn digits_alone(text: &str, expected: &str) -> String {
    match without_separators(text) {
        Some(_) => format!("{expected}, without 0x and separators"),
        None => format!("{expected}, in quotes"),
    }
}

/// The bytes that an even number of hex digits stands for.
fn octets(text: &str) -> Option<Vec<u8>> {
    let digit = |octet: &u8| char::from(*octet).to_digit(16).and_then(|n| u8::try_from(n).ok());
    // Each pair by itself: what is collected in between would have to be wiped.
    let (pairs, rest) = text.as_bytes().as_chunks();
    let octet = |[high, low]: &[u8; 2]| Some(digit(high)? << 4 | digit(low)?);
    let mut octets = Vec::with_capacity(pairs.len());
    for pair in pairs {
        octets.push(octet(pair)?);
    }
    rest.is_empty().then_some(octets)
}

/// Reports addresses that stand for several hosts, or for one in a way that hides it.
fn is_of_one_host(address: IpAddr, place: &Place, mistakes: &mut Mistakes) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_multicast() || is_broadcast {
        mistakes.error(place, format!("{address}, which is many hosts"), "the address of one host");
        return false;
    }
    let canonical = address.to_canonical();
    if canonical != address {
        let found = format!("the IPv4 address {canonical} inside an IPv6 address");
        mistakes.error(place, found, format!("{canonical} itself"));
        return false;
    }
    true
}

fn looks_like_host_name(text: &str) -> bool {
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    host.contains(|c: char| c.is_alphabetic())
        && host.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | '_'))
}
