//! Several ranges of a file in one answer (`multipart/byteranges`).
//!
//! The service behind this serves one range. Each range that is asked for is asked of it, and the parts are put together as they are
//! read, so that nothing is held in memory. Whoever asks for too much gets the whole file: a server is free to ignore ranges.
//!
//! <https://www.rfc-editor.org/rfc/rfc9110.html#section-14>

use std::fmt::Write as _;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::seed;

/// The most ranges in one answer: each takes an open file.
const MAX_RANGES: usize = 16;

/// A part of an answer: where it is in the file, and the service's answer for it.
struct Part {
    first: u64,
    last: u64,
    response: Response,
}

/// Answers requests for several ranges, and lets others through to `next`.
pub(super) async fn serve(mut request: Request, next: Next) -> Response {
    let fields = request.headers_mut();
    // "MUST ignore the Range header field" if the validator does not match, which nobody behind this looks at.
    if fields.contains_key(header::IF_RANGE) {
        fields.remove(header::RANGE);
    }
    let Some(ranges) = several(request.method(), request.headers()) else {
        return next.run(request).await;
    };
    let (parts, _) = request.into_parts();
    if ranges.len() <= MAX_RANGES {
        match ask(&parts, &ranges, &next).await {
            Ok(answers) => {
                if let Some(response) = together(answers) {
                    return response;
                }
            }
            Err(other) => return other,
        }
    }
    next.run(asking(&parts, None)).await
}

/// The ranges that a request asks for, if there are several.
fn several(method: &Method, fields: &HeaderMap) -> Option<Vec<String>> {
    let value = fields.get(header::RANGE).filter(|_| method == Method::GET)?.to_str().ok()?;
    let ranges = value.strip_prefix("bytes=")?.split(',').map(|range| range.trim().to_owned());
    let ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    (ranges.len() > 1).then_some(ranges)
}

/// Asks for each range. An answer that is not about ranges is the answer, as is one that they are all outside of the file.
async fn ask(parts: &Parts, ranges: &[String], next: &Next) -> Result<Vec<Part>, Response> {
    let (mut answers, mut outside) = (Vec::new(), None);
    for range in ranges {
        let response = next.clone().run(asking(parts, Some(range))).await;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => match place(&response) {
                Some((first, last)) => answers.push(Part { first, last, response }),
                None => return Err(response),
            },
            StatusCode::RANGE_NOT_SATISFIABLE => outside = Some(response),
            _ => return Err(response),
        }
    }
    match outside {
        Some(response) if answers.is_empty() => Err(response),
        _ => Ok(answers),
    }
}

/// The request with another range, or without any.
fn asking(parts: &Parts, range: Option<&str>) -> Request {
    let mut parts = parts.clone();
    let value = range.and_then(|range| HeaderValue::try_from(format!("bytes={range}")).ok());
    match value {
        Some(value) => drop(parts.headers.insert(header::RANGE, value)),
        None => drop(parts.headers.remove(header::RANGE)),
    }
    Request::from_parts(parts, Body::empty())
}

/// Where in the file an answer is.
fn place(response: &Response) -> Option<(u64, u64)> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (place, _) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = place.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// One answer of several; `None` where they overlap, which is more than anybody needs to ask for, or cannot be told apart.
fn together(mut answers: Vec<Part>) -> Option<Response> {
    let mut places: Vec<_> = answers.iter().map(|part| (part.first, part.last)).collect();
    places.sort_unstable();
    if places.windows(2).any(|pair| pair[1].0 <= pair[0].1) {
        return None;
    }
    if answers.len() == 1 {
        return answers.pop().map(|part| part.response);
    }
    let boundary = format!("{:032x}", u128::from_be_bytes(*seed().ok()?.first_chunk()?));
    let mut fields = answers.first()?.response.headers().clone();
    let (mut length, mut pieces) = (0, Vec::new());
    for (nth, Part { first, last, response }) in answers.into_iter().enumerate() {
        let mut head = if nth == 0 { String::new() } else { "\r\n".to_owned() };
        let _ = write!(head, "--{boundary}\r\n");
        for name in [header::CONTENT_TYPE, header::CONTENT_RANGE] {
            let value = response.headers().get(&name)?.to_str().ok()?;
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        length += head.len() as u64 + (last - first + 1);
        pieces.push((head, response.into_body()));
    }
    let end = format!("\r\n--{boundary}--\r\n");
    length += end.len() as u64;
    let literal = |text: String| stream::iter([Ok::<_, axum::Error>(Bytes::from(text))]);
    let pieces =
        stream::iter(pieces).map(move |(head, body)| literal(head).chain(body.into_data_stream()));
    let body = Body::from_stream(pieces.flatten().chain(literal(end)));
    let kind = format!("multipart/byteranges; boundary={boundary}");
    fields.insert(header::CONTENT_TYPE, HeaderValue::try_from(kind).ok()?);
    fields.insert(header::CONTENT_LENGTH, length.into());
    fields.remove(header::CONTENT_RANGE);
    Some((StatusCode::PARTIAL_CONTENT, fields, body).into_response())
}
