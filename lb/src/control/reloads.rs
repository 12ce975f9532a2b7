//! Requests to read the configuration, and what comes of them.

use tokio::sync::oneshot;

use super::changes::Changes;

/// Whoever wants the file to be read, and to know what came of it.
pub(super) struct Request {
    /// Whether to take away what live connections use.
    pub(super) forced: bool,
    pub(super) answer: oneshot::Sender<Reloaded>,
}

/// What came of reading the file.
#[derive(Clone, Debug)]
pub(super) enum Reloaded {
    /// It is in force.
    Applied { digest: String, changes: Changes },
    /// It is what was in force.
    Unchanged { digest: String },
    /// It was refused; a sentence for each reason.
    Rejected(Vec<String>),
    /// It is going to be in force; that takes longer than somebody waits.
    Taken,
    /// It could not be looked at; a sentence.
    Unread(String),
}
