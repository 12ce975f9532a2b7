//! Puts the octets of a stream, which arrive in any order, back in line.
//!
//! Octets are copied into blocks; which of them are present is a prefix, and a bitmap where there
//! are gaps. What a peer can make us hold is therefore at most nine eighths of the range of
//! offsets it may use, whatever it sends: one-octet frames at every other offset cost no more than
//! a full stream. Nothing here counts fragments, so nothing legal is ever refused.

use std::collections::VecDeque;

/// Octets per block.
const BLOCK: usize = 4096;
/// Blocks whose memory waits to be used again: those of a first window.
const MAX_SPARE: usize = 64;

/// Places for blocks that an emptied assembler keeps.
const FEW_BLOCKS: usize = 4;

/// The receive side of a stream of octets. Flow control is the caller's: `insert` takes what it is
/// given, and the caller bounds the offsets.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    /// Blocks from the one that holds `read` on; `None` where nothing has arrived.
    blocks: VecDeque<Option<Block>>,
    /// The offset of the next octet to read.
    read: u64,
    /// The end of what can be read without a gap.
    contiguous: u64,
    /// The memory of blocks that were read, for those to come.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Block {
    /// The place in the block where `octets` begins: what had been read when it came into use.
    start: usize,
    /// Octets up to the highest that arrived; those in gaps are zero.
    octets: Vec<u8>,
    /// The end of the octets that are present without a gap.
    prefix: usize,
    /// Presence, octet by octet, while there are gaps.
    present: Option<Box<[u64; BLOCK / 64]>>,
}

impl Assembler {
    /// Takes `data` at `offset`. What was there before, or has been read, is ignored.
    pub(crate) fn insert(&mut self, offset: u64, data: &[u8]) {
        let skip = self.read.saturating_sub(offset);
        let skip = usize::try_from(skip).unwrap_or(usize::MAX).min(data.len());
        let (mut offset, mut data) = (offset + skip as u64, &data[skip..]);
        while !data.is_empty() {
            let (index, within) = self.locate(offset);
            let len = data.len().min(BLOCK - within);
            let (here, rest) = data.split_at(len);
            if self.blocks.len() <= index {
                self.blocks.resize_with(index + 1, || None);
            }
            let start = if index == 0 { self.locate(self.read).1 } else { 0 };
            // Who sends more than a block will fill the next one too.
            let whole = offset >= BLOCK as u64;
            let spare = &mut self.spare;
            let block = self.blocks[index].get_or_insert_with(|| {
                let mut octets = spare.pop().unwrap_or_default();
                octets.clear();
                octets.reserve_exact(if whole { BLOCK - start } else { 0 });
                Block::new(start, octets)
            });
            block.insert(within, here);
            offset += len as u64;
            data = rest;
        }
        self.extend_contiguous();
    }

    /// Forgets everything, and keeps the memory of one block for a stream to come.
    pub(crate) fn empty(&mut self) {
        let Self { mut blocks, mut spare, .. } = std::mem::take(self);
        spare.extend(blocks.drain(..).flatten().map(|block| block.octets));
        spare.truncate(1);
        spare.shrink_to(1);
        blocks.shrink_to(FEW_BLOCKS);
        *self = Self { blocks, spare, ..Self::default() };
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.spare = Vec::new();
        if self.is_drained() {
            self.blocks = VecDeque::new();
        }
    }

    /// The octets that can be read now, up to the end of a block.
    pub(crate) fn peek(&self) -> &[u8] {
        let (index, within) = self.locate(self.read);
        match self.blocks.get(index) {
            Some(Some(block)) if within < block.prefix => {
                &block.octets[within - block.start..block.prefix - block.start]
            }
            _ => &[],
        }
    }

    /// Steps over `count` octets that [`Self::peek`] showed.
    pub(crate) fn consume(&mut self, count: usize) {
        let before = self.read / BLOCK as u64;
        self.read = (self.read + count as u64).min(self.contiguous);
        let (_, within) = self.locate(self.read);
        if self.read / BLOCK as u64 > before {
            if let Some(Some(block)) = self.blocks.pop_front()
                && self.spare.len() < MAX_SPARE
            {
                self.spare.push(block.octets);
            }
        } else if let Some(Some(first)) = self.blocks.front_mut()
            && first.end() == within
        {
            first.reuse(within);
        }
    }

    /// Reads into `out`; returns how many octets.
    pub(crate) fn read(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        while done < out.len() {
            let here = self.peek();
            let len = here.len().min(out.len() - done);
            if len == 0 {
                break;
            }
            out[done..done + len].copy_from_slice(&here[..len]);
            self.consume(len);
            done += len;
        }
        done
    }

    /// The offset of the next octet to read.
    pub(crate) const fn read_offset(&self) -> u64 {
        self.read
    }

    /// Whether there is something to read.
    pub(crate) const fn is_readable(&self) -> bool {
        self.contiguous > self.read
    }

    /// Whether octets are waiting that cannot be read because of a gap, or have not been read.
    pub(crate) fn is_drained(&self) -> bool {
        let (_, within) = self.locate(self.read);
        !self.is_readable()
            && self.blocks.iter().enumerate().all(|(index, block)| match block {
                Some(block) => index == 0 && block.end() <= within,
                None => true,
            })
    }

    /// The block of `offset`, which is not below `read`, and the place in it.
    #[expect(clippy::cast_possible_truncation, reason = "the window is bounded by flow control")]
    const fn locate(&self, offset: u64) -> (usize, usize) {
        let block = BLOCK as u64;
        ((offset / block - self.read / block) as usize, (offset % block) as usize)
    }

    fn extend_contiguous(&mut self) {
        let block = BLOCK as u64;
        loop {
            let (index, _) = self.locate(self.contiguous.max(self.read));
            let Some(Some(found)) = self.blocks.get(index) else { return };
            let start = (self.read / block + index as u64) * block;
            let end = start + found.prefix as u64;
            if end <= self.contiguous {
                return;
            }
            self.contiguous = end;
            if found.prefix < BLOCK {
                return;
            }
        }
    }
}

impl Block {
    const fn new(start: usize, octets: Vec<u8>) -> Self {
        Self { start, octets, prefix: start, present: None }
    }

    /// Starts anew at `start`, with the memory of before.
    fn reuse(&mut self, start: usize) {
        self.octets.clear();
        (self.start, self.prefix, self.present) = (start, start, None);
    }

    fn end(&self) -> usize {
        self.start + self.octets.len()
    }

    fn insert(&mut self, at: usize, data: &[u8]) {
        let end = at + data.len();
        if end <= self.prefix {
            return;
        }
        if at <= self.prefix && self.present.is_none() {
            let fresh = &data[self.prefix - at..];
            self.octets.extend_from_slice(fresh);
            self.prefix = end;
            return;
        }
        if self.end() < end {
            self.octets.resize(end - self.start, 0);
        }
        self.octets[at - self.start..end - self.start].copy_from_slice(data);
        let prefix = self.prefix;
        let present = self.present.get_or_insert_with(|| {
            let mut words = Box::new([0; BLOCK / 64]);
            set(&mut words, 0, prefix);
            words
        });
        set(present, at, end);
        self.prefix = leading(present);
        if self.prefix == self.end() {
            self.present = None;
        }
    }
}

/// Sets the bits `from..to`.
fn set(words: &mut [u64; BLOCK / 64], from: usize, to: usize) {
    let mut at = from;
    while at < to {
        let (word, bit) = (at / 64, at % 64);
        let count = (64 - bit).min(to - at);
        words[word] |= (u64::MAX >> (64 - count)) << bit;
        at += count;
    }
}

/// How many bits from the start are set.
fn leading(words: &[u64; BLOCK / 64]) -> usize {
    let full = words.iter().take_while(|&&word| word == u64::MAX).count();
    full * 64 + words.get(full).map_or(0, |word| word.trailing_ones() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn octet(offset: u64) -> u8 {
        u8::try_from(offset * 31 % 251).unwrap()
    }

    fn octets(range: std::ops::Range<u64>) -> Vec<u8> {
        range.map(octet).collect()
    }

    #[test]
    fn req_g12_one_octet_frames_at_every_other_offset_stay_within_nine_eighths() {
        let mut assembler = Assembler::default();
        let window = 1u64 << 20;
        for offset in (1..window).step_by(2) {
            assembler.insert(offset, &[octet(offset)]);
        }
        assert!(!assembler.is_readable());
        let held: usize = assembler
            .blocks
            .iter()
            .flatten()
            .map(|block| block.octets.capacity() + block.present.as_ref().map_or(0, |_| BLOCK / 8))
            .sum();
        let slots = assembler.blocks.capacity() * size_of::<Option<Block>>();
        assert!(held + slots <= usize::try_from(window).unwrap() * 5 / 4);
        for offset in (0..window).step_by(2) {
            assembler.insert(offset, &[octet(offset)]);
        }
        let mut out = vec![0; usize::try_from(window).unwrap()];
        assert_eq!(assembler.read(&mut out), out.len());
        assert_eq!(out, octets(0..window));
        assert!(assembler.is_drained());
    }

    proptest! {
        #[test]
        fn octets_come_out_in_order_however_they_arrive(
            mut pieces in proptest::collection::vec((0u64..20_000, 0u64..6000), 1..60),
            reads in proptest::collection::vec(1usize..9000, 1..60),
        ) {
            let end = pieces.iter().map(|(start, len)| start + len).max().unwrap();
            pieces.push((0, end));
            let mut assembler = Assembler::default();
            let mut reads = reads.into_iter().cycle();
            let mut out = Vec::new();
            let mut model = super::super::ranges::RangeSet::default();
            for (start, len) in pieces {
                assembler.insert(start, &octets(start..start + len));
                model.insert(start..start + len);
                let readable = model.first().filter(|range| range.start == 0);
                let readable = readable.map_or(0, |range| range.end);
                prop_assert_eq!(assembler.is_readable(), readable > assembler.read_offset());
                let mut chunk = vec![0; reads.next().unwrap()];
                let count = assembler.read(&mut chunk);
                prop_assert_eq!(count.min(1) == 1, out.len() as u64 != readable);
                out.extend_from_slice(&chunk[..count]);
                prop_assert_eq!(out.len() as u64, assembler.read_offset());
            }
            let mut rest = vec![0; 30_000];
            let count = assembler.read(&mut rest);
            out.extend_from_slice(&rest[..count]);
            prop_assert_eq!(out, octets(0..end));
            prop_assert!(assembler.is_drained());
        }
    }
}
