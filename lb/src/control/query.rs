//! Queries of requests to the admin interface.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// What a part of a query means.
pub(super) fn decoded(text: &str) -> Result<Cow<'_, str>, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| "the query is not UTF-8 behind its percent signs".to_owned())
}
