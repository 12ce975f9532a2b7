//! `GET /api/v1/explain`: what the running balancer would do with a datagram, by its workers' own
//! tables, in the words of `quic-lb explain`.
//!
//! The kernel gives each client path to one worker. All are asked, and the one that knows the path
//! is believed; when none does, they would all decide alike. One question is asked at a time.

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
    sync::{Arc, mpsc::TryRecvError},
    time::Duration,
};

use axum::{
    Json,
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use quic_lb_config::{Config, Listener};
use serde_json::json;
use tokio::time;

use super::{answers::error, query::decoded, shared::Shared};
use crate::{
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    explained::Explained,
    words::{Hex, count},
    worker::mailbox::{Answer, Sample},
};

/// How long an answer may take, the questions of others before it included. A worker without
/// traffic looks into its mailbox ten times a second.
const PATIENCE: Duration = Duration::from_secs(2);

/// From one look for answers to the next.
const LOOK: Duration = Duration::from_millis(5);

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    from: SocketAddr,
    octets: Arc<[u8]>,
    listener: Option<String>,
    /// The address that the client sends to, for listeners on all addresses.
    to: Option<IpAddr>,
}

/// Why there is no answer: a status, and what would be right.
type Refused = (StatusCode, String);

pub(super) async fn explain(
    State(shared): State<Arc<Shared>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let asked = match Asked::read(query.as_deref().unwrap_or_default()) {
        Ok(asked) => asked,
        Err(sentence) => return error(StatusCode::BAD_REQUEST, &sentence),
    };
    let samples = {
        let plane = shared.plane();
        asked.samples(plane.config(), |listener| plane.listener_index(listener))
    };
    let samples = match samples {
        Ok(samples) => samples,
        Err((status, sentence)) => return error(status, &sentence),
    };
    let Ok(answered) = time::timeout(PATIENCE, ask(&shared, samples)).await else {
        let sentence = "no worker has answered within two seconds; ask again";
        return error(StatusCode::SERVICE_UNAVAILABLE, sentence);
    };
    let answered = match answered {
        Some(answered) => answered,
        None => {
            return error(
                StatusCode::SERVICE_UNAVAILABLE,
                "no worker can answer that: see /api/v1/panics",
            );
        }
    };
    if wants_json(&headers) { asked.json(&answered) } else { asked.text(&answered) }
}

/// The answer for each listener, by name.
async fn ask(shared: &Shared, samples: Vec<(String, Sample)>) -> Option<Vec<(String, Explained)>> {
    let mailboxes = shared.mailboxes().await;
    let mut answered = Vec::with_capacity(samples.len());
    for (listener, sample) in samples {
        let answers = mailboxes.ask(&sample);
        let mut best = None;
        loop {
            match answers.try_recv() {
                Ok(Answer { explained, knows_path: true }) => {
                    best = Some(explained);
                    break;
                }
                Ok(Answer { explained, knows_path: false }) => best = Some(explained),
                Err(TryRecvError::Empty) => time::sleep(LOOK).await,
                Err(TryRecvError::Disconnected) => break,
            }
        }
        answered.push((listener, best?));
    }
    Some(answered)
}

/// Text, unless JSON is asked for.
fn wants_json(headers: &HeaderMap) -> bool {
    let accepted = headers.get(header::ACCEPT).and_then(|accepted| accepted.to_str().ok());
    accepted.is_some_and(|accepted| accepted.contains("application/json"))
}

impl Asked {
    fn read(query: &str) -> Result<Self, String> {
        let (mut from, mut hex, mut listener, mut to) = (None, None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value)?;
            let place = match key {
                "from" => &mut from,
                "hex" => &mut hex,
                "listener" => &mut listener,
                "to" => &mut to,
                _ => {
                    let key = decoded(key)?;
                    return Err(format!("\"{key}\" is none of from, hex, listener and to"));
                }
            };
            if place.replace(value).is_some() {
                return Err(format!("{key} is there twice; once would do"));
            }
        }
        let from = from.ok_or_else(|| format!("from is missing: {FROM}"))?;
        let hex = hex.ok_or_else(|| format!("hex is missing: {HEX}"))?;
        let to = to.map(|to| to.parse().map_err(|_| format!("to=\"{to}\" is no address: {TO}")));
        let Hex(octets) = hex.parse().map_err(|why| format!("hex: {why}: {HEX}"))?;
        Ok(Self {
            from: from.parse().map_err(|_| format!("from=\"{from}\" is no address: {FROM}"))?,
            octets: octets.into(),
            listener: listener.map(Cow::into_owned),
            to: to.transpose()?,
        })
    }

    /// What is asked of each listener.
    fn samples(
        &self,
        config: &Config,
        index: impl Fn(&Listener) -> Option<ListenerIndex>,
    ) -> Result<Vec<(String, Sample)>, Refused> {
        let all = || config.listeners.iter();
        let wanted = |listener: &Listener| {
            self.listener.as_ref().is_none_or(|wanted| *wanted == listener.name)
        };
        let samples: Result<Vec<_>, _> = all()
            .filter(|listener| wanted(listener))
            // One that is leaving already is left out.
            .filter_map(|listener| Some((index(listener)?, listener)))
            .map(|(listener_index, listener)| {
                let local = match (listener.address.ip().is_unspecified(), self.to) {
                    (false, _) => None,
                    (true, Some(to)) => Some(to.to_canonical()),
                    (true, None) => {
                        let name = &listener.name;
                        let why = format!("listener {name} listens on all addresses: add {TO}");
                        return Err((StatusCode::BAD_REQUEST, why));
                    }
                };
                let path = ClientPath { client: ClientAddr::written(self.from), local };
                let octets = Arc::clone(&self.octets);
                let sample = Sample { listener: listener_index, path, octets };
                Ok((listener.name.clone(), sample))
            })
            .collect();
        let samples = samples?;
        if samples.is_empty() {
            let names: Vec<_> = all().map(|listener| listener.name.as_str()).collect();
            let wanted = self.listener.as_deref().unwrap_or_default();
            let why = format!("there is no listener \"{wanted}\"; there is {}", names.join(", "));
            return Err((StatusCode::NOT_FOUND, why));
        }
        Ok(samples)
    }

    fn json(&self, answered: &[(String, Explained)]) -> Response {
        let each = answered.iter().map(|(listener, explained)| {
            let mut value = explained.json();
            value["listener"] = json!(listener);
            value["from"] = json!(self.from);
            value["bytes"] = json!(self.octets.len());
            value
        });
        Json(each.collect::<Vec<_>>()).into_response()
    }

    fn text(&self, answered: &[(String, Explained)]) -> Response {
        let len = count(self.octets.len(), "byte");
        let each = answered.iter().map(|(listener, explained)| {
            format!("{len} from {} to listener {listener}\n{explained}", self.from)
        });
        let format = HeaderValue::from_static("text/plain; charset=utf-8");
        ([(header::CONTENT_TYPE, format)], each.collect::<String>()).into_response()
    }
}

const FROM: &str = "the client's address and port, such as from=192.0.2.7:50000";
const HEX: &str = "the UDP payload in hex, such as hex=4007c4605e4504cc4f";
const TO: &str = "the address that the client sends to, such as to=192.0.2.1";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn read(query: &str) -> Result<Asked, String> {
        Asked::read(query)
    }

    #[test]
    fn a_question_is_read_in_any_order_and_with_escapes() {
        let asked = Asked {
            from: "[2001:db8::7]:50000".parse().unwrap(),
            octets: [0x40, 7].into(),
            listener: Some("edge".into()),
            to: Some("2001:db8::1".parse().unwrap()),
        };
        for query in [
            "from=[2001:db8::7]:50000&hex=4007&listener=edge&to=2001:db8::1",
            "to=2001%3adb8%3A%3A1&listener=%65dge&hex=40%2007&from=%5B2001:db8::7%5D:50000&",
        ] {
            assert_eq!(read(query).as_ref(), Ok(&asked), "{query}");
        }
    }

    #[test]
    fn a_bad_question_is_answered_by_what_would_be_right() {
        for (query, sentence) in [
            ("", "from is missing: the client's address and port"),
            ("from=192.0.2.7:5", "hex is missing: the UDP payload in hex"),
            ("hex=40", "from is missing"),
            (
                "from=192.0.2.7&hex=40",
                "from=\"192.0.2.7\" is no address: the client's address and port",
            ),
            ("from=192.0.2.7:5&hex=4", "hex: 1 hex digits are half a byte too many"),
            ("from=192.0.2.7:5&hex=4g", "hex: 'g' is not a hex digit"),
            ("from=192.0.2.7:5&hex=40&to=here", "to=\"here\" is no address"),
            ("from=192.0.2.7:5&hex=40&hex=41", "hex is there twice"),
            ("from=192.0.2.7:5&payload=40", "\"payload\" is none of from, hex, listener and to"),
            ("from=%ff&hex=40", "not UTF-8"),
        ] {
            let told = read(query).unwrap_err();
            assert!(told.contains(sentence), "{query}: {told}");
        }
        assert!(read("from=192.0.2.7:5&hex=").is_ok(), "an empty datagram is one");
    }

    #[test]
    fn every_listener_is_asked_unless_one_is_named() {
        let mut config = fixtures::config(true);
        let mut all = config.listeners[0].clone();
        (all.name, all.address) = ("all".into(), "0.0.0.0:443".parse().unwrap());
        config.listeners.push(all);
        let samples = |query: &str| {
            let index =
                |of: &Listener| config.listeners.iter().position(|l| l == of).map(ListenerIndex);
            let samples = read(query).unwrap().samples(&config, index)?;
            let sample =
                |(name, sample): (String, Sample)| (name, sample.listener.0, sample.path.local);
            Ok(samples.into_iter().map(sample).collect::<Vec<_>>())
        };
        let to: IpAddr = "192.0.2.1".parse().unwrap();
        let [edge, all] = [("edge".to_owned(), 0, None), ("all".to_owned(), 1, Some(to))];
        let question = |rest: &str| samples(&format!("from=192.0.2.7:5&hex=40{rest}"));
        assert_eq!(question("&to=192.0.2.1"), Ok(vec![edge.clone(), all.clone()]));
        assert_eq!(question("&listener=edge"), Ok(vec![edge]));
        assert_eq!(question("&listener=all&to=192.0.2.1"), Ok(vec![all]));
        let refused = |rest| question(rest).unwrap_err();
        let (status, sentence) = refused("&listener=all");
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(sentence.contains("add the address that the client sends to"), "{sentence}");
        let (status, sentence) = refused("&listener=other");
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(sentence, "there is no listener \"other\"; there is edge, all");
    }
}
