//! Opens the sockets of listeners that a configuration brings, before it is applied: each worker its own, and all of them or
//! none.

use std::{
    io,
    sync::mpsc::{Receiver, TryRecvError},
    time::Duration,
};

use quic_lb_config::system_error::why_not_listening;
use tokio::time;
use tracing::info;

use super::shared::Shared;
use crate::{
    client_path::{ListenerAddr, ListenerIndex},
    listeners::Opening,
    socket::{Families, Sharing},
    worker::mailbox::{Mailboxes, Place},
};

/// How long the workers may take for one step. One without traffic looks into its mailbox ten times a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// From one look for answers to the next.
const LOOK: Duration = Duration::from_millis(2);

/// Opens the sockets of these listeners. They are served from the first snapshot on that has them.
///
/// # Errors
///
/// Why not, in a sentence; then none of them is open.
pub(super) async fn open(shared: &Shared, wanted: &[Opening]) -> Result<(), String> {
    if wanted.is_empty() {
        return Ok(());
    }
    let mailboxes = shared.mailboxes().await;
    let opened = open_all(&mailboxes, wanted).await;
    if opened.is_err() {
        close(&mailboxes, wanted).await;
    }
    opened
}

async fn close(mailboxes: &Mailboxes, opened: &[Opening]) {
    let indices: Vec<_> = opened.iter().map(|opening| opening.index).collect();
    // A worker that does not answer finds the request when it does.
    let _ = answers(mailboxes.close(&indices)).await;
}

async fn open_all(mailboxes: &Mailboxes, wanted: &[Opening]) -> Result<(), String> {
    // Sockets of a listener that was at such an address before are closed by then.
    answers(mailboxes.close(&[])).await?;
    let place = |Opening { index, listener }: &Opening| Place {
        listener: *index,
        address: ListenerAddr(listener.address),
        families: if listener.both_families { Families::Both } else { Families::Own },
    };
    let mut places: Vec<_> = wanted.iter().map(place).collect();
    let refused = |(refused, error): (ListenerIndex, io::Error)| {
        let name = wanted.iter().find(|opening| opening.index == refused);
        let (name, address) =
            name.map_or(("", None), |of| (&of.listener.name, Some(of.listener.address)));
        let address = address.map(|address| address.to_string()).unwrap_or_default();
        format!("listener {name} cannot listen on {address}: {}", why_not_listening(&error))
    };
    // The first worker takes the addresses, and finds out which ports stand for 0.
    for opened in answers(mailboxes.open(&places, Sharing::First)).await? {
        for (place, address) in places.iter_mut().zip(opened.map_err(refused)?) {
            place.address = address;
        }
    }
    for opened in answers(mailboxes.open(&places, Sharing::Join)).await? {
        opened.map_err(refused)?;
    }
    for (Opening { listener, .. }, place) in wanted.iter().zip(&places) {
        info!(listener = listener.name, address = %place.address, "listening");
    }
    Ok(())
}

/// What all who were asked answer.
async fn answers<T>(received: Receiver<T>) -> Result<Vec<T>, String> {
    let wait = async move {
        let mut all = vec![];
        loop {
            match received.try_recv() {
                Ok(answer) => all.push(answer),
                Err(TryRecvError::Empty) => time::sleep(LOOK).await,
                Err(TryRecvError::Disconnected) => return all,
            }
        }
    };
    time::timeout(PATIENCE, wait).await.map_err(|_| "a worker does not answer".to_owned())
}
