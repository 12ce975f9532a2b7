//! Metrics that are compressed for whoever takes them so: with thousands of backends they are megabytes, and a tenth of that then.

use std::io::{self, Write as _};

use axum::http::{HeaderMap, header};
use flate2::{Compression, write::GzEncoder};

/// Whether the answer to a request may be compressed with gzip.
pub(super) fn is_accepted(headers: &HeaderMap) -> bool {
    let given = headers.get_all(header::ACCEPT_ENCODING).iter();
    let codings = given.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    codings.map(str::trim).any(|coding| {
        let mut words = coding.split(';').map(str::trim);
        let is_gzip = words.next().is_some_and(|name| name.eq_ignore_ascii_case("gzip"));
        // A weight of zero says no.
        let refused = words.filter_map(|word| word.split_once('=')).any(|(name, weight)| {
            name.trim().eq_ignore_ascii_case("q") && weight.trim().parse() == Ok(0.0)
        });
        is_gzip && !refused
    })
}

/// Compresses a text, as fast as can be: it is made anew for each scrape.
pub(super) fn compressed(text: &str) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 8), Compression::fast());
    encoder.write_all(text.as_bytes())?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn who_says_that_they_take_gzip_get_it() {
        let accepts = |given: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in given {
                headers.append(header::ACCEPT_ENCODING, value.parse().unwrap());
            }
            is_accepted(&headers)
        };
        for yes in
            ["gzip", "GZip", "gzip;q=1.0", "deflate, gzip;q=0.5", "br , gzip ", "gzip;q=0.001"]
        {
            assert!(accepts(&[yes]), "{yes}");
        }
        for no in
            ["", "identity", "gzip;q=0", "gzip; q=0.000", "xgzip", "*", "deflate;q=1,gzip;Q=0"]
        {
            assert!(!accepts(&[no]), "{no}");
        }
        assert!(!accepts(&[]));
        assert!(accepts(&["br", "gzip"]));
    }

    #[test]
    fn what_is_compressed_is_less_and_the_same() {
        let text = "quic_lb_backend_state{pool=\"web\"} 1\n".repeat(10_000);
        let octets = compressed(&text).unwrap();
        assert!(octets.len() < text.len() / 10, "{}", octets.len());
        let mut again = String::new();
        flate2::read::GzDecoder::new(&octets[..]).read_to_string(&mut again).unwrap();
        assert_eq!(again, text);
        assert_eq!(compressed("").map(|octets| octets[..2].to_vec()).unwrap(), [0x1f, 0x8b]);
    }
}
