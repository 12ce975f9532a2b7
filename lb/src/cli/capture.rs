//! UDP datagrams out of a pcap or pcapng file, over IPv4 and IPv6.
//!
//! What is in the file may be anything; nothing here panics. Frames that no datagram comes out of are
//! counted, with the reason.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice, ip_number};
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

use super::{
    links,
    outcome::Failure,
    unread::{Tally, Unread},
};

/// What the reader starts with; larger blocks make it grow.
const BUFFER: usize = 256 * 1024;
/// No link has frames like that: the file is damaged.
const LARGEST_BLOCK: usize = 64 * 1024 * 1024;

/// One UDP datagram of a capture.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Captured<'a> {
    /// Counted from 1, over all frames.
    pub(super) frame: usize,
    /// Since the beginning of 1970, if the file says so.
    pub(super) time: Option<Duration>,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    /// What was captured of the payload.
    pub(super) octets: &'a [u8],
    /// How long the payload was on the wire.
    pub(super) wire_len: usize,
}

/// How much of the file was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// All of it.
    Complete,
    /// The file ends inside a frame.
    CutOff,
}

/// Hands every UDP datagram of the file to `take`, in order, and counts the other frames.
pub(super) fn read(
    path: &Path,
    unread: &mut Tally,
    mut take: impl FnMut(&Captured<'_>) -> Result<(), Failure>,
) -> Result<End, Failure> {
    let name = path.display();
    let cannot_read = |error| Failure::other(format_args!("cannot read {name}: {error}"));
    let file = File::open(path).map_err(cannot_read)?;
    let mut reader = create_reader(BUFFER, file).map_err(|error| match error {
        PcapError::ReadError => Failure::other(format_args!("cannot read {name}")),
        _ => Failure::other(format_args!("{name} is neither a pcap nor a pcapng file")),
    })?;
    let mut links = Links::default();
    let mut frame = 0;
    let mut buffer = BUFFER;
    loop {
        let block = match reader.next() {
            Ok((octets, block)) => {
                if let Some(packet) = links.packet(&block) {
                    frame += 1;
                    match packet.and_then(|packet| udp(frame, &packet)) {
                        Ok(captured) => take(&captured)?,
                        Err(reason) => unread.add(frame, reason),
                    }
                }
                octets
            }
            Err(PcapError::Eof) => return Ok(End::Complete),
            Err(PcapError::UnexpectedEof) => return Ok(End::CutOff),
            Err(PcapError::Incomplete(_)) => {
                reader.refill().map_err(|_| Failure::other(format_args!("cannot read {name}")))?;
                continue;
            }
            Err(PcapError::BufferTooSmall) if buffer < LARGEST_BLOCK => {
                buffer *= 2;
                if reader.grow(buffer) {
                    continue;
                }
                return Err(damaged(path, frame));
            }
            Err(_) => return Err(damaged(path, frame)),
        };
        reader.consume(block);
    }
}

fn damaged(path: &Path, frame: usize) -> Failure {
    Failure::other(format_args!("{} is damaged behind frame {frame}", path.display()))
}

/// How frames are wrapped: one link for a pcap, one for each interface of a pcapng section.
#[derive(Debug, Default)]
struct Links {
    legacy: Option<(Linktype, bool)>,
    interfaces: Vec<Interface>,
}

#[derive(Debug)]
struct Interface {
    link: Linktype,
    units_per_second: u64,
    /// To be added to every time of the interface, in seconds.
    offset: i64,
}

/// One frame.
#[derive(Debug)]
struct Frame<'a> {
    link: Linktype,
    time: Option<Duration>,
    octets: &'a [u8],
}

impl Links {
    /// The frame in a block, if there is one.
    fn packet<'a>(&mut self, block: &'a PcapBlockOwned<'_>) -> Option<Result<Frame<'a>, Unread>> {
        match block {
            PcapBlockOwned::LegacyHeader(header) => {
                self.legacy = Some((header.network, header.is_nanosecond_precision()));
                None
            }
            PcapBlockOwned::Legacy(packet) => {
                let Some((link, nanoseconds)) = self.legacy else {
                    return Some(Err(Unread::UnknownInterface));
                };
                let unit = if nanoseconds { 1 } else { 1_000 };
                let time = Duration::from_secs(packet.ts_sec.into())
                    + Duration::from_nanos(u64::from(packet.ts_usec) * unit);
                let octets = captured(packet.data, packet.caplen);
                Some(Ok(Frame { link, time: Some(time), octets }))
            }
            PcapBlockOwned::NG(Block::SectionHeader(_)) => {
                self.interfaces.clear();
                None
            }
            PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                let units_per_second = interface.ts_resolution().unwrap_or(1_000_000).max(1);
                let (link, offset) = (interface.linktype, interface.ts_offset());
                self.interfaces.push(Interface { link, units_per_second, offset });
                None
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let interface = usize::try_from(packet.if_id).ok();
                let Some(interface) = interface.and_then(|id| self.interfaces.get(id)) else {
                    return Some(Err(Unread::UnknownInterface));
                };
                let units = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                let (per_second, units) = (interface.units_per_second, units);
                let rest = u128::from(units % per_second) * 1_000_000_000 / u128::from(per_second);
                let seconds = (units / per_second).saturating_add_signed(interface.offset);
                let time = Duration::from_secs(seconds)
                    .saturating_add(Duration::from_nanos(u64::try_from(rest).unwrap_or_default()));
                let octets = captured(packet.data, packet.caplen);
                Some(Ok(Frame { link: interface.link, time: Some(time), octets }))
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                let Some(interface) = self.interfaces.first() else {
                    return Some(Err(Unread::UnknownInterface));
                };
                let octets = captured(packet.data, packet.origlen);
                Some(Ok(Frame { link: interface.link, time: None, octets }))
            }
            PcapBlockOwned::NG(_) => None,
        }
    }
}

/// Blocks are padded; what was captured comes first.
fn captured(data: &[u8], len: u32) -> &[u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    &data[..data.len().min(len)]
}

fn udp<'a>(frame: usize, packet: &Frame<'a>) -> Result<Captured<'a>, Unread> {
    let Frame { link, time, octets } = *packet;
    let ip = links::ip_packet(link.0, octets)?;
    let sliced = LaxSlicedPacket::from_ip(ip).map_err(|_| match ip.first().map(|ip| ip >> 4) {
        // A header that is there whole is wrong otherwise.
        Some(4) if ip.len() >= 20 => Unread::Malformed,
        Some(6) if ip.len() >= 40 => Unread::Malformed,
        Some(4 | 6) | None => Unread::CutOff,
        Some(_) => Unread::NoIp,
    })?;
    let (source, destination, payload): (IpAddr, IpAddr, _) = match sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let payload = ip.payload().clone();
            (header.source_addr().into(), header.destination_addr().into(), payload)
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let payload = ip.payload().clone();
            (header.source_addr().into(), header.destination_addr().into(), payload)
        }
        Some(LaxNetSlice::Arp(_)) | None => return Err(Unread::NoIp),
    };
    if payload.fragmented {
        return Err(Unread::Fragment);
    }
    let udp = match sliced.transport {
        Some(TransportSlice::Udp(udp)) => udp,
        None if payload.ip_number == ip_number::UDP && payload.payload.len() >= 8 => {
            return Err(Unread::Malformed);
        }
        None if payload.ip_number == ip_number::UDP => return Err(Unread::CutOff),
        Some(_) | None => return Err(Unread::NoUdp),
    };
    // Zero stands for a length that does not fit, as with segmentation offload.
    let stated = usize::from(udp.length()).saturating_sub(8);
    Ok(Captured {
        frame,
        time,
        source: (source, udp.source_port()).into(),
        destination: (destination, udp.destination_port()).into(),
        octets: udp.payload(),
        wire_len: stated.max(udp.payload().len()),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    const ETHERNET: u32 = 1;
    const RAW: u32 = 101;
    const LINUX_SLL: u32 = 113;
    const LINUX_SLL2: u32 = 276;

    #[test]
    fn every_link_and_both_families_are_read() {
        let payload = b"datagram";
        let (v4, v6) = (ip_packet(false, payload), ip_packet(true, payload));
        let ethernet = |ether_type: [u8; 2], ip: &[u8]| [&[2; 12], &ether_type[..], ip].concat();
        let vlan = [&[2; 12], &[0x81, 0, 0, 7, 0x86, 0xdd][..], &v6].concat();
        let sll = [&[0, 0, 0, 1, 0, 6][..], &[0; 8], &[8, 0], &v4].concat();
        let sll2 = [&[0x86, 0xdd][..], &[0; 6], &[0, 1, 0, 6], &[0; 8], &v6].concat();
        for (link, frame, ipv6) in [
            (ETHERNET, ethernet([8, 0], &v4), false),
            (ETHERNET, ethernet([0x86, 0xdd], &v6), true),
            (ETHERNET, vlan, true),
            (LINUX_SLL, sll, false),
            (LINUX_SLL2, sll2, true),
            (RAW, v4.clone(), false),
            (RAW, v6.clone(), true),
        ] {
            for file in [pcap(link, &[&frame]), pcapng(link, &[&frame])] {
                let (end, seen) = read_all(&file);
                assert_eq!(end, End::Complete);
                let [(source, destination, octets)] = seen.as_slice() else {
                    panic!("link {link}: {seen:?}")
                };
                assert_eq!((source, destination), (&from(ipv6), &to(ipv6)), "link {link}");
                assert_eq!(octets, payload);
            }
        }
    }

    #[test]
    fn times_are_those_of_the_clock_whatever_their_unit_and_offset() {
        let packet = ip_packet(false, b"datagram");
        // Nanoseconds, and an offset of a thousand seconds.
        let options =
            [&[9, 0, 1, 0, 9, 0, 0, 0][..], &[14, 0, 8, 0], &1000i64.to_le_bytes(), &[0; 4]];
        let interface = [&RAW.to_le_bytes()[..], &65535u32.to_le_bytes(), &options.concat()];
        let len = u32::try_from(packet.len()).unwrap().to_le_bytes();
        let stamp = 5_000_000_007u64;
        let [high, low] =
            [stamp >> 32, stamp & 0xffff_ffff].map(|half| u32::try_from(half).unwrap());
        let stamps = [high.to_le_bytes(), low.to_le_bytes()].concat();
        let file = pcapng_of(&[
            (1, interface.concat()),
            (6, [&[0; 4], &stamps[..], &len, &len, &packet].concat()),
            (3, [&len[..], &packet].concat()),
        ]);
        let mut times = vec![];
        read(written(&file).path(), &mut Tally::default(), |captured| {
            times.push(captured.time);
            Ok(())
        })
        .unwrap();
        assert_eq!(times, [Some(Duration::new(1005, 7)), None]);
    }

    #[test]
    fn a_file_that_ends_inside_a_frame_gives_what_is_there() {
        let packet = ip_packet(false, b"datagram");
        let file = pcap(RAW, &[&packet, &packet]);
        let (end, seen) = read_all(&file[..file.len() - 3]);
        assert_eq!((end, seen.len()), (End::CutOff, 1));
    }

    #[test]
    fn frames_that_no_datagram_comes_out_of_are_counted_with_the_reason() {
        let mut tcp = ip_packet(false, b"");
        tcp[9] = 6;
        let mut fragment = ip_packet(false, b"datagram");
        fragment[6] = 0x20;
        let cut = &ip_packet(false, b"datagram")[..24];
        for (link, frame, reason) in [
            (127, &[0; 60][..], "1 frame of link type 127, which is not read here: frame 1"),
            (
                ETHERNET,
                &[[2; 12].as_slice(), &[8, 6, 0, 1]].concat(),
                "1 frame without IP: frame 1",
            ),
            (RAW, &tcp, "1 frame without UDP: frame 1"),
            (RAW, &fragment, "1 frame with a fragment of a datagram: frame 1"),
            (RAW, cut, "1 frame cut off inside the headers: frame 1"),
        ] {
            for file in [pcap(link, &[frame]), pcapng(link, &[frame])] {
                let mut unread = Tally::default();
                let end =
                    read(written(&file).path(), &mut unread, |captured| panic!("{captured:?}"));
                assert_eq!(end.unwrap(), End::Complete);
                assert_eq!(unread.to_string(), format!("not read: {reason}\n"));
            }
        }
    }

    #[test]
    fn other_files_are_refused_in_one_sentence() {
        for content in [&b""[..], b"listeners:\n  - name: edge\n", &[0; 100]] {
            let file = written(content);
            let failure = read(file.path(), &mut Tally::default(), |_| Ok(())).unwrap_err();
            let Failure::Other(sentence) = failure else { panic!("{failure:?}") };
            assert!(sentence.ends_with("is neither a pcap nor a pcapng file"), "{sentence}");
        }
    }

    proptest! {
        #[test]
        fn damaged_captures_never_panic(
            ng: bool,
            link in prop_oneof![Just(ETHERNET), Just(RAW), Just(LINUX_SLL), Just(LINUX_SLL2), any::<u16>().prop_map(u32::from)],
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..120), 0..4),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let frames: Vec<_> = frames.iter().map(Vec::as_slice).collect();
            let mut file = if ng { pcapng(link, &frames) } else { pcap(link, &frames) };
            for (place, octet) in damage {
                let place = place.index(file.len());
                file[place] = octet;
            }
            let file = written(&file);
            let _ = read(file.path(), &mut Tally::default(), |_| Ok(()));
        }
    }

    fn from(ipv6: bool) -> SocketAddr {
        if ipv6 { "[2001:db8::1]:50000" } else { "192.0.2.1:50000" }.parse().unwrap()
    }

    fn to(ipv6: bool) -> SocketAddr {
        if ipv6 { "[2001:db8::2]:4433" } else { "192.0.2.2:4433" }.parse().unwrap()
    }

    fn ip_packet(ipv6: bool, payload: &[u8]) -> Vec<u8> {
        let builder = match (from(ipv6).ip(), to(ipv6).ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                PacketBuilder::ipv6(from.octets(), to.octets(), 64)
            }
            _ => unreachable!("both of one family"),
        };
        let mut packet = vec![];
        builder.udp(50000, 4433).write(&mut packet, payload).unwrap();
        packet
    }

    fn pcap(link: u32, frames: &[&[u8]]) -> Vec<u8> {
        let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend(65535u32.to_le_bytes());
        file.extend(link.to_le_bytes());
        for frame in frames {
            let len = u32::try_from(frame.len()).unwrap().to_le_bytes();
            file.extend([[0; 4], [0; 4], len, len].concat());
            file.extend(*frame);
        }
        file
    }

    fn pcapng(link: u32, frames: &[&[u8]]) -> Vec<u8> {
        let interface = [&link.to_le_bytes()[..], &65535u32.to_le_bytes()].concat();
        let frames = frames.iter().map(|frame| {
            let len = u32::try_from(frame.len()).unwrap().to_le_bytes();
            (6, [&[0; 12], &len[..], &len, frame].concat())
        });
        pcapng_of(&[(1, interface)].into_iter().chain(frames).collect::<Vec<_>>())
    }

    /// These blocks behind the header of a section.
    fn pcapng_of(blocks: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let mut file = vec![];
        let mut block = |kind: u32, body: &[u8]| {
            let padded = body.len().next_multiple_of(4);
            let len = u32::try_from(padded + 12).unwrap().to_le_bytes();
            file.extend(kind.to_le_bytes());
            file.extend(len);
            file.extend(body);
            file.extend(vec![0; padded - body.len()]);
            file.extend(len);
        };
        block(0x0a0d_0d0a, &[&[0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0], &[0xff; 8][..]].concat());
        blocks.iter().for_each(|(kind, body)| block(*kind, body));
        file
    }

    fn written(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn read_all(content: &[u8]) -> (End, Vec<(SocketAddr, SocketAddr, Vec<u8>)>) {
        let mut seen = vec![];
        let end = read(written(content).path(), &mut Tally::default(), |captured| {
            seen.push((captured.source, captured.destination, captured.octets.to_vec()));
            Ok(())
        });
        (end.unwrap(), seen)
    }
}
