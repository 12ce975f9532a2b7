//! What an origin does wrong on request, so that others can be seen to cope with it.

use std::{str::FromStr, time::Duration};

use quic_lb_config::units::parse_duration;

/// One way to misbehave, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Misbehaviour {
    /// None.
    #[default]
    None,
    /// Connection IDs carry the server ID of another backend of the pool.
    WrongServerId,
    /// Takes datagrams and never answers.
    Silent,
    /// Every answer waits for this long.
    Slow(Duration),
    /// Every new connection is refused.
    Refusing,
    /// The last octet of every body of `/bytes` is wrong.
    WrongBody,
    /// Every other answer names another backend.
    TwoFaced,
}

impl FromStr for Misbehaviour {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            "none, wrong-server-id, wrong-body, two-faced, silent, refusing, or slow=200ms";
        match text.split_once('=') {
            None => match text {
                "none" => Ok(Self::None),
                "wrong-server-id" => Ok(Self::WrongServerId),
                "wrong-body" => Ok(Self::WrongBody),
                "two-faced" => Ok(Self::TwoFaced),
                "silent" => Ok(Self::Silent),
                "refusing" => Ok(Self::Refusing),
                _ => Err(format!("expected {expected}")),
            },
            Some(("slow", delay)) => {
                parse_duration(delay).map(Self::Slow).map_err(|error| error.to_string())
            }
            Some(_) => Err(format!("expected {expected}")),
        }
    }
}
