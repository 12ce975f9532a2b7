//! Upgrade: the file of this program is executed beside the running process, which hands over to the new one all that it has and
//! then ends. No socket is closed, and who speaks to whom stays as it was.
//!
//! ```text
//!  this process (predecessor)                    the new one (successor)
//!
//!  starts it ───────────────────────────────────► reads its configuration
//!  version, Hello: who listens, numbers of
//!  backends, commands, health ──────────────────► builds tables, starts workers, which wait
//!                                 ◄────────────── Prepared
//!  its workers stop, each between two rounds
//!  ports, listeners, flows with ────────────────► each worker takes over those of one worker
//!  their sockets, worker by worker
//!  Rest: what is remembered ────────────────────► takes it over
//!                                 ◄────────────── Serving, and its workers begin
//!  ends
//! ```
//!
//! What arrives while nobody reads waits in the sockets' buffers. Nothing of the predecessor changes until its successor serves: if the
//! new process ends, says no, or takes too long, it is killed, and the workers go on where they stopped. What cannot be had
//! twice, ports and the sequence of workers in the groups of listeners, is in the sockets themselves.
//!
//! The first channel is the standard input of the new process, which an environment variable tells. Each worker has one of its own
//! to its successor, since workers have tables of descriptors of their own. Where the new process is to have listeners that are not
//! open yet, or another number of workers, it refuses: the one takes a reload before, the other a restart.
//!
//! What is not handed over begins anew: counters, limits on new connections, whether addresses are validated where that
//! follows the load, loops that are being watched. Tokens need nothing but keys.
//!
//! | part | what it is for |
//! | --- | --- |
//! | `predecessor` | starts the new process, and hands over |
//! | `successor` | takes over |

mod predecessor;
mod successor;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{doors::Where, plane::handed::HandedPlane};
use crate::{
    memory::{Handed, HandedBasis},
    registry::HandedNumbers,
};
pub(super) use predecessor::{Binary, Upgrader};
pub(super) use successor::Predecessor;

/// Says that standard input is a channel to a predecessor.
const VARIABLE: &str = "QUIC_LB_TAKES_OVER";

/// How long a new process may take to read its configuration, from a slow disk, and to build its tables.
const PREPARING: Duration = Duration::from_secs(30);
/// How long the hand-over may take, while nobody reads.
const STANDSTILL: Duration = Duration::from_secs(5);

/// What a successor is told first, after the version. Descriptors come with it: a channel for each worker, then the doors
/// of the admin interface.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    workers: usize,
    /// Of the admin interface.
    doors: Vec<Where>,
    /// Whether the predecessor has given up rights, which its successor does not have from the beginning.
    confined: bool,
    memory: HandedBasis,
    numbers: HandedNumbers,
    plane: HandedPlane,
}

/// What a successor says. The first variant is understood by every version.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It cannot take over, for this reason.
    Refused(String),
    /// All that can fail has been tried but the hand-over.
    Prepared,
    /// It has all, and begins.
    Serving,
}

/// What a successor is told when the workers have stopped.
#[derive(Debug, Serialize, Deserialize)]
struct Rest {
    memory: Handed,
    plane: HandedPlane,
}
