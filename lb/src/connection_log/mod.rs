//! The connection log: a record where a connection begins and one where it ends, as far as a balancer can tell.
//!
//! What begins and ends here is a *flow*: a client path bound to a backend. Nobody between a client and a server can read
//! that a connection is closed, so that a flow ends when nothing was heard for long enough, or sooner to make room. A client
//! that goes on from another address begins another flow; that the one before was left is its reason to end, once the
//! connection has proved itself on the new path. Several connections of one client socket to one backend are one flow.
//!
//! ```text
//! worker ── ledger ── queue ──┐
//! worker ── ledger ── queue ──┴──► writer, a thread of its own ──► file or standard output
//! ```
//!
//! Workers wait for nobody: a queue takes a record or has no room, which is counted. They wake nobody either: the writer looks
//! into the queues a few times a second, and blocks alone where a disk does.
//!
//! | part | what it is for |
//! | --- | --- |
//! | `record` | what is said of a flow |
//! | `ledger` | the flows of a worker that are logged |
//! | `sample` | the share of them that is logged |
//! | `queue` | from a worker to the writer |
//! | `names` | what listeners and backends are called |
//! | `line` | a record as JSON or text |
//! | `output` | where lines go |
//! | `writer` | the thread that writes |

pub(crate) mod ledger;
mod line;
mod names;
mod output;
pub mod queue;
pub(crate) mod record;
pub mod sample;
pub(crate) mod writer;
