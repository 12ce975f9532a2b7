//! DATAGRAM frames: unreliable messages, queued in both directions within bounds.
//!
//! <https://www.rfc-editor.org/rfc/rfc9221.html>

use std::collections::VecDeque;

use bytes::Bytes;

/// What a queued message counts besides its octets, so that empty ones are bounded too.
const OVERHEAD: usize = size_of::<Bytes>();

/// Messages in one direction, within a budget of octets.
#[derive(Debug)]
pub(crate) struct Queue {
    messages: VecDeque<Bytes>,
    octets: usize,
    budget: usize,
}

impl Queue {
    pub(crate) fn new(budget: usize) -> Self {
        Self { messages: VecDeque::new(), octets: 0, budget }
    }

    /// Whether `message` fits without dropping another.
    pub(crate) fn has_room(&self, message: &[u8]) -> bool {
        self.octets + message.len() + OVERHEAD <= self.budget
    }

    /// Adds `message`, dropping the oldest ones until it fits. Returns how many were dropped.
    pub(crate) fn push(&mut self, message: Bytes) -> u64 {
        let mut dropped = 0;
        while !self.has_room(&message) {
            if self.pop().is_none() {
                return 1;
            }
            dropped += 1;
        }
        self.octets += message.len() + OVERHEAD;
        self.messages.push_back(message);
        dropped
    }

    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let message = self.messages.pop_front()?;
        self.octets -= message.len() + OVERHEAD;
        Some(message)
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.messages.shrink_to_fit();
    }

    pub(crate) fn front(&self) -> Option<&Bytes> {
        self.messages.front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_messages_stay_within_the_budget_and_the_oldest_go_first() {
        let mut queue = Queue::new(10_000);
        let mut dropped = 0;
        for number in 0..1_000_000u32 {
            dropped += queue.push(Bytes::copy_from_slice(&number.to_be_bytes()));
            assert!(queue.octets <= 10_000);
        }
        let first = queue.pop().expect("the last ones are kept");
        assert_eq!(u64::from(u32::from_be_bytes(first[..].try_into().unwrap())), dropped);
        for _ in 0..1_000_000 {
            queue.push(Bytes::new());
        }
        assert!(queue.messages.len() <= 10_000 / OVERHEAD);
        assert_eq!(queue.push(Bytes::from(vec![0; 20_000])), 1);
        assert!(queue.is_empty());
    }
}
