//! The load client.

mod session;

pub use session::{Answer, OpenError, RequestError, Session};
