//! What the admin interface serves, and in what order: before anything is done for a request, it has
//! arrived whole, is meant for this process and not sent by a foreign page, and has a place.
//!
//! Questions about health need no place, and are answered whatever else goes on.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    body::{self, Body},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header, request::Parts},
    middleware::Next,
    response::Response,
};
use quic_lb_config::{BearerToken, Commands};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time,
};

use super::{
    answers::error,
    connections::{Connection, InService},
    doors::Access,
    shared::Shared,
};

/// Requests that are served at a time, each for a few milliseconds, or as long as a table takes that
/// has to be filled.
const MAX_IN_SERVICE: u32 = 64;
/// For a place to become free.
const PLACE_TIMEOUT: Duration = Duration::from_secs(2);
/// For the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// For the body of a request, in bytes: a number and its name.
const MAX_BODY: usize = 256;

/// How a token is shown.
const BEARER: &[u8] = b"Bearer ";

/// What stands in front of the routes.
pub(super) struct Guard {
    shared: Arc<Shared>,
    access: Access,
    places: Semaphore,
    place_timeout: Duration,
    body_timeout: Duration,
}

/// Whether who sends a request may command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MayCommand(pub(super) bool);

/// Why a request is not served: a status and a sentence.
type Refused = (StatusCode, String);

/// A place among the requests that are served.
type Place<'a> = (Option<SemaphorePermit<'a>>, Option<InService>);

/// Serves what may be served, and adds what browsers should know about every answer.
pub(super) async fn guard(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    let mut response = match guard.admit(request).await {
        Ok((request, _place)) => next.run(request).await,
        Err(refused) => refused,
    };
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

impl Guard {
    pub(super) fn new(shared: Arc<Shared>, access: Access) -> Self {
        Self {
            shared,
            access,
            places: Semaphore::new(MAX_IN_SERVICE as usize),
            place_timeout: PLACE_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
        }
    }

    /// The request with its body, once there is a place for it; otherwise the answer.
    async fn admit(&self, request: Request) -> Result<(Request, Place<'_>), Response> {
        let (mut head, body) = request.into_parts();
        if is_probe(&head.method, &head.uri) {
            return Ok((Request::from_parts(head, Body::empty()), (None, None)));
        }
        self.check_host(&head.uri, head.version, &head.headers)
            .map_err(|(status, sentence)| error(status, &sentence))?;
        let reads = matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS);
        if !reads && head.headers.contains_key(header::ORIGIN) {
            return Err(error(StatusCode::FORBIDDEN, "commands are not taken from web pages"));
        }
        let may_command = match self.access {
            Access::Everything => true,
            Access::Reading => false,
            Access::WithProof => self.is_proved(&head),
        };
        // They are judged where it is known whose they are.
        head.extensions.insert(MayCommand(may_command));
        match self.access {
            Access::Everything => {}
            Access::Reading | Access::WithProof if is_report(&head.method, &head.uri) => {}
            Access::Reading if reads => {}
            Access::Reading => {
                let sentence = "commands are not taken here: see admin.commands";
                return Err(error(StatusCode::FORBIDDEN, sentence));
            }
            Access::WithProof if may_command => {}
            Access::WithProof => return Err(wants_token("admin.commands.token_file")),
        }
        let body = self.read(body).await?;
        let place = time::timeout(self.place_timeout, self.places.acquire()).await;
        let Ok(Ok(place)) = place else {
            let sentence = "as many requests are being served as there may be; ask again";
            return Err(error(StatusCode::SERVICE_UNAVAILABLE, sentence));
        };
        let in_service = head.extensions.get::<Connection>().map(Connection::serve);
        Ok((Request::from_parts(head, body), (Some(place), in_service)))
    }

    /// A page of somebody else reaches this process by a name that it makes lead here, and the
    /// browser then takes the two for one. Names are ours or refused; an address cannot be made to
    /// lead elsewhere.
    fn check_host(&self, uri: &Uri, version: Version, headers: &HeaderMap) -> Result<(), Refused> {
        let mut given = headers.get_all(header::HOST).iter();
        let host = match (given.next(), given.next()) {
            (Some(host), None) => host.to_str().ok(),
            (None, _) if version < Version::HTTP_11 => None,
            _ => return Err((StatusCode::BAD_REQUEST, "a request has one Host".to_owned())),
        };
        let named = [uri.authority().map(|authority| authority.as_str()), host];
        for host in named.into_iter().flatten() {
            let name = without_port(host);
            if !is_of_every_host(name) && !self.is_ours(name) {
                let sentence = format!(
                    "the host \"{}\" is not this one: use its address, or list the name in \
                     admin.host_names",
                    name.escape_default()
                );
                return Err((StatusCode::MISDIRECTED_REQUEST, sentence));
            }
        }
        Ok(())
    }

    /// Whether a request shows what commands want to be shown, which a reload may change.
    fn is_proved(&self, Parts { headers, extensions, .. }: &Parts) -> bool {
        let plane = self.shared.plane();
        match plane.config().admin.as_ref().and_then(|admin| admin.commands.as_ref()) {
            Some(Commands::Token(_, token)) => shows(headers, token),
            Some(Commands::Certificates(..)) => {
                extensions.get::<Connection>().is_some_and(Connection::has_certificate)
            }
            Some(Commands::Unix(_)) | None => false,
        }
    }

    fn is_ours(&self, name: &str) -> bool {
        let plane = self.shared.plane();
        let admin = plane.config().admin.as_ref();
        admin.is_some_and(|admin| {
            admin.host_names.iter().any(|ours| ours.eq_ignore_ascii_case(name))
        })
    }

    async fn read(&self, body: Body) -> Result<Body, Response> {
        match time::timeout(self.body_timeout, body::to_bytes(body, MAX_BODY)).await {
            Ok(Ok(octets)) => Ok(octets.into()),
            // Or the connection is gone, and nobody hears this.
            Ok(Err(_)) => {
                let sentence = format!("a body has at most {MAX_BODY} bytes");
                Err(error(StatusCode::PAYLOAD_TOO_LARGE, &sentence))
            }
            Err(_) => {
                let mut late = error(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
                late.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                Err(late)
            }
        }
    }
}

/// Whether service managers and load balancers ask this.
fn is_probe(method: &Method, uri: &Uri) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && matches!(uri.path(), "/healthz" | "/readyz")
}

/// Whether servers tell something of themselves, which is no command.
fn is_report(method: &Method, uri: &Uri) -> bool {
    *method == Method::POST && uri.path().ends_with("/half_open")
}

/// Whether a request shows this token.
pub(super) fn shows(headers: &HeaderMap, token: &BearerToken) -> bool {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(given), None) = (given.next(), given.next()) else { return false };
    let Some((scheme, shown)) = given.as_bytes().split_at_checked(BEARER.len()) else {
        return false;
    };
    scheme.eq_ignore_ascii_case(BEARER) && token.is(shown.trim_ascii())
}

/// To be sent where the token is not shown that is in the file called so.
pub(super) fn wants_token(file: &str) -> Response {
    let sentence = format!("this takes \"Authorization: Bearer\" with the token in {file}");
    let mut refused = error(StatusCode::UNAUTHORIZED, &sentence);
    let scheme = HeaderValue::from_static("Bearer");
    refused.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
    refused
}

/// Addresses, and the name by which every host calls itself.
fn is_of_every_host(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

fn without_port(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use axum::{Router, middleware, routing::get};
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;
    use quic_lb_config::Admin;

    use super::*;
    use crate::{
        control::plane::ControlPlane,
        fixtures,
        memory::Memory,
        worker::{mailbox::Mailboxes, panics::Panics},
    };

    fn guarded() -> Guard {
        let mut config = fixtures::config(true);
        let address = "127.0.0.1:9090".parse().unwrap();
        let host_names = vec!["lb.example".into()];
        config.admin = Some(Admin { address, host_names, commands: None });
        let memory = Arc::new(Memory::new(10, std::time::Instant::now(), [0; 4]));
        let plane = ControlPlane::new(config, memory, [1, 2]);
        let panics = Arc::new(Panics::new(0));
        Guard::new(Arc::new(Shared::new(plane, Mailboxes::default(), panics)), Access::Everything)
    }

    async fn ask(of: &Arc<Guard>, request: Request) -> StatusCode {
        let routes = ["/healthz", "/readyz", "/metrics"].iter();
        let echo = |body: body::Bytes| async move { body };
        let router = routes
            .fold(Router::new(), |router, path| router.route(path, get(|| async {}).post(echo)));
        let router = router.layer(middleware::from_fn_with_state(Arc::clone(of), guard));
        TowerToHyperService::new(router).call(request).await.unwrap().status()
    }

    fn request(method: Method, uri: &str, host: &str, body: Body) -> Request {
        Request::builder().method(method).uri(uri).header(header::HOST, host).body(body).unwrap()
    }

    #[tokio::test]
    async fn names_are_ours_or_refused() {
        let guard = Arc::new(guarded());
        for (host, status) in [
            ("localhost", StatusCode::OK),
            ("LOCALHOST:9090", StatusCode::OK),
            ("localhost.", StatusCode::OK),
            ("127.0.0.1:9090", StatusCode::OK),
            ("192.0.2.1", StatusCode::OK),
            ("[::1]:9090", StatusCode::OK),
            ("[::1]", StatusCode::OK),
            ("lb.example:9090", StatusCode::OK),
            ("LB.example", StatusCode::OK),
            ("example", StatusCode::MISDIRECTED_REQUEST),
            ("x.lb.example", StatusCode::MISDIRECTED_REQUEST),
            ("127.0.0.1.example", StatusCode::MISDIRECTED_REQUEST),
            ("[::1].example:80", StatusCode::MISDIRECTED_REQUEST),
            ("", StatusCode::MISDIRECTED_REQUEST),
        ] {
            let asked = request(Method::GET, "/metrics", host, Body::empty());
            assert_eq!(ask(&guard, asked).await, status, "{host:?}");
            let probe = request(Method::GET, "/healthz", host, Body::empty());
            assert_eq!(ask(&guard, probe).await, StatusCode::OK, "{host:?}");
        }
        let elsewhere = request(Method::GET, "http://example/metrics", "localhost", Body::empty());
        assert_eq!(ask(&guard, elsewhere).await, StatusCode::MISDIRECTED_REQUEST);
        let mut twice = request(Method::GET, "/metrics", "localhost", Body::empty());
        twice.headers_mut().append(header::HOST, HeaderValue::from_static("localhost"));
        assert_eq!(ask(&guard, twice).await, StatusCode::BAD_REQUEST);
        let mut none = request(Method::GET, "/metrics", "localhost", Body::empty());
        none.headers_mut().clear();
        assert_eq!(ask(&guard, none).await, StatusCode::BAD_REQUEST);
        let mut old = request(Method::GET, "/metrics", "localhost", Body::empty());
        old.headers_mut().clear();
        *old.version_mut() = Version::HTTP_10;
        assert_eq!(ask(&guard, old).await, StatusCode::OK, "no browser sends that");
    }

    #[tokio::test]
    async fn probes_are_answered_while_every_place_is_taken() {
        let guard = Arc::new(Guard { place_timeout: Duration::from_millis(10), ..guarded() });
        let _all = guard.places.acquire_many(MAX_IN_SERVICE).await.unwrap();
        let get = |uri| request(Method::GET, uri, "localhost", Body::empty());
        for probe in ["/healthz", "/readyz"] {
            assert_eq!(ask(&guard, get(probe)).await, StatusCode::OK, "{probe}");
        }
        assert_eq!(ask(&guard, get("/metrics")).await, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn a_body_has_its_time_and_its_size_and_takes_no_place_before() {
        let guard = Arc::new(Guard { body_timeout: Duration::from_millis(10), ..guarded() });
        let post = |body| request(Method::POST, "/metrics", "localhost", body);
        assert_eq!(ask(&guard, post(Body::from(vec![b'x'; MAX_BODY]))).await, StatusCode::OK);
        let large = post(Body::from(vec![b'x'; MAX_BODY + 1]));
        assert_eq!(ask(&guard, large).await, StatusCode::PAYLOAD_TOO_LARGE);
        let _all = guard.places.acquire_many(MAX_IN_SERVICE).await.unwrap();
        let never = post(Body::new(Never));
        assert_eq!(ask(&guard, never).await, StatusCode::REQUEST_TIMEOUT);
    }

    /// A body that does not come.
    struct Never;

    impl hyper::body::Body for Never {
        type Data = body::Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
            std::task::Poll::Pending
        }
    }
}
