//! The values that stand at the ends of the tree: names, addresses, numbers with bounds, durations,
//! words from a list, server IDs and keys.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use quic::routable::{ConfigId, Key, MAX_SERVER_ID_LEN, ServerId};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::{
    checked::{Admission, Admittance, LogFormat, LogLevel, RetryMode, TokenFormat, UnknownPackets},
    mistake::{Mistakes, Place},
    read::{At, Read, join, place_of},
    units::{display_duration, parse_config_id, parse_duration},
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint(pub(crate) SocketAddr);

impl Read for Endpoint {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "\"IP:port\" or \"[IPv6]:port\"";
        let text = text(node, place, expected, mistakes)?;
        let found = || format!("\"{}\"", shown(text));
        let Ok(address) = text.parse::<SocketAddr>() else {
            let (found, expected) = if text.parse::<IpAddr>().is_ok() {
                (format!("{}, which has no port", found()), expected.to_owned())
            } else if looks_like_host_name(text) {
                let expected = format!("{expected}; names are not resolved");
                (format!("the host name {}", found()), expected)
            } else {
                (found(), expected.to_owned())
            };
            mistakes.error(place, found, expected);
            return None;
        };
        if address.port() == 0 {
            mistakes.error(place, format!("{}, port 0", found()), "a port from 1 to 65535");
            return None;
        }
        is_of_one_host(address.ip(), place, mistakes).then_some(Self(address))
    }
}

inline_schema!(() Endpoint, |_generator| json_schema!({
    "type": "string",
    "pattern": "^([0-9.]+|\\[[0-9A-Fa-f:.]+(%[0-9]+)?\\]):[0-9]{1,5}$",
}));

/// An IP address of one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) IpAddr);

impl Read for Address {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "an IP address without a port";
        let text = text(node, place, expected, mistakes)?;
        let Ok(address) = text.parse::<IpAddr>() else {
            mistakes.error(place, node.describe(), expected);
            return None;
        };
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
            mistakes.error(place, found, expected);
        }
        within.map(Self)
    }
}

inline_schema!((const MIN: u64, const MAX: u64) Interval<MIN, MAX>, |_generator| json_schema!({
    "type": "string",
    "pattern": "^[0-9]+(ms|s|m|h)$",
}));

/// A type of which each value has a word of its own.
macro_rules! words {
    ($type:ty: $($word:literal => $value:ident),*) => {
        impl $type {
            /// The word for it in the file.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$value => $word),*
                }
            }
        }

        impl Read for $type {
            fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
                let expected = format!("one of \"{}\"", [$($word),*].join("\", \""));
                match text(node, place, &expected, mistakes)? {
                    $($word => Some(Self::$value),)*
                    _ => {
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

words!(Admission: "active" => Active, "draining" => Draining);
words!(LogLevel:
    "error" => Error, "warn" => Warn, "info" => Info, "debug" => Debug, "trace" => Trace);
words!(LogFormat: "text" => Text, "json" => Json);

words!(RetryMode: "off" => Off, "always" => Always, "adaptive" => Adaptive);
words!(TokenFormat: "nat" => Nat, "shared_state" => SharedState);
words!(Admittance: "allow" => Allow, "deny" => Deny);
words!(UnknownPackets: "forward" => Forward, "refuse" => Refuse);

/// The number of a QUIC version as it is on the wire, in hex behind `0x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WireVersion(pub(crate) u32);

impl Read for WireVersion {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let expected = "\"0x\" and eight hex digits";
        let digits = text(node, place, expected, mistakes)?.strip_prefix("0x");
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
        let text = text(node, place, expected, mistakes)?;
        let iv = octets(text).and_then(|octets| octets.try_into().ok());
        if iv.is_none() {
            // Someone may have put the key here: it is not shown.
            let found = format!("{} characters", text.chars().count());
            mistakes.error(place, found, expected);
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
        let text = text(node, place, expected, mistakes)?;
        let server_id = octets(text).and_then(|octets| ServerId::new(&octets));
        if server_id.is_none() {
            let found = match text.len() {
                _ if !text.bytes().all(|b| b.is_ascii_hexdigit()) => node.describe(),
                0 => "an empty text".to_owned(),
                digits if digits % 2 == 1 => format!("an odd number of hex digits, {digits}"),
                digits => format!("{digits} hex digits, more than {}", 2 * MAX_SERVER_ID_LEN),
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
                Content::Scalar { text, .. } => &**text,
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

/// The bytes of a key. They are never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Secret([u8; 16]);

impl Secret {
    /// What a key has to be; for reports.
    pub(crate) const EXPECTED: &str = "32 hex digits";

    /// Takes 32 hex digits. `Err` says what was found without showing it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(key) = octets(text).and_then(|octets| octets.try_into().ok()) {
            return Ok(Self(key));
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
        Key::new(self.0)
    }

    pub(crate) const fn octets(&self) -> [u8; 16] {
        self.0
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(masked)")
    }
}

impl Read for Secret {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let found = match node.text() {
            Some(text) => match Self::parse(text) {
                Ok(secret) => return Some(secret),
                Err(found) => found,
            },
            None if matches!(node.content, Content::Broken) => return None,
            None => node.kind().to_owned(),
        };
        mistakes.error(place, found, format!("{}, in quotes", Self::EXPECTED));
        None
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

/// The bytes that an even number of hex digits stands for.
fn octets(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2))?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
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
