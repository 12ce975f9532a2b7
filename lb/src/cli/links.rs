//! From a frame to the IP packet in it, by the number of its link type
//! (<https://www.tcpdump.org/linktypes.html>).

use super::unread::Unread;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Tags of virtual networks: 802.1Q, 802.1ad, and what came before that.
const VLAN: [u16; 3] = [0x8100, 0x88a8, 0x9100];
const MPLS: [u16; 2] = [0x8847, 0x8848];
const PPPOE_SESSION: u16 = 0x8864;

/// Labels and tags inside each other; no network has so many.
const MAX_TAGS: usize = 16;

/// The IP packet in a frame of this link.
pub(super) fn ip_packet(link: i32, frame: &[u8]) -> Result<&[u8], Unread> {
    match link {
        // BSD loopback: a family in the byte order of the host, or of the network.
        0 | 108 => {
            let (family, rest) = frame.split_first_chunk::<4>().ok_or(Unread::CutOff)?;
            match u32::from_be_bytes(*family).min(u32::from_le_bytes(*family)) {
                // 24, 28 and 30 are IPv6 on the BSDs and macOS, 10 on Linux.
                2 | 10 | 24 | 28 | 30 => Ok(rest),
                _ => Err(Unread::NoIp),
            }
        }
        1 => ethernet(frame),
        // PPP, and in HDLC framing.
        9 | 50 => ppp(frame),
        51 => pppoe(frame),
        // Raw IP, under the numbers that it has had, and of one family.
        12 | 14 | 101 | 228 | 229 => Ok(frame),
        // Cisco HDLC: an address, a control byte, an Ethernet type.
        104 => typed(frame, 2, 4),
        // Linux "cooked" captures.
        113 => typed(frame, 14, 16),
        276 => typed(frame, 0, 20),
        other => Err(Unread::Link(other)),
    }
}

fn ethernet(frame: &[u8]) -> Result<&[u8], Unread> {
    typed(frame, 12, 14)
}

/// What is behind a header of `len` bytes that has an Ethernet type at `at`.
fn typed(frame: &[u8], at: usize, len: usize) -> Result<&[u8], Unread> {
    let rest = frame.get(len..).ok_or(Unread::CutOff)?;
    let ether_type = be_u16(&frame[at..]).ok_or(Unread::CutOff)?;
    of_type(ether_type, rest)
}

fn of_type(mut ether_type: u16, mut rest: &[u8]) -> Result<&[u8], Unread> {
    for _ in 0..MAX_TAGS {
        if !VLAN.contains(&ether_type) {
            break;
        }
        ether_type = be_u16(rest.get(2..).ok_or(Unread::CutOff)?).ok_or(Unread::CutOff)?;
        rest = rest.get(4..).ok_or(Unread::CutOff)?;
    }
    match ether_type {
        IPV4 | IPV6 => Ok(rest),
        PPPOE_SESSION => pppoe(rest),
        mpls if MPLS.contains(&mpls) => behind_labels(rest),
        _ => Err(Unread::NoIp),
    }
}

/// Labels of four bytes, of which the last is marked.
fn behind_labels(mut rest: &[u8]) -> Result<&[u8], Unread> {
    for _ in 0..MAX_TAGS {
        let (label, behind) = rest.split_first_chunk::<4>().ok_or(Unread::CutOff)?;
        rest = behind;
        if label[2] & 1 == 1 {
            // Nothing says what is behind them, but the version of IP.
            return match rest.first().map(|first| first >> 4) {
                Some(4 | 6) => Ok(rest),
                // A control word, and a frame of its own.
                Some(0) => ethernet(rest.get(4..).ok_or(Unread::CutOff)?),
                Some(_) => Err(Unread::NoIp),
                None => Err(Unread::CutOff),
            };
        }
    }
    Err(Unread::NoIp)
}

fn pppoe(session: &[u8]) -> Result<&[u8], Unread> {
    ppp(session.get(6..).ok_or(Unread::CutOff)?)
}

fn ppp(frame: &[u8]) -> Result<&[u8], Unread> {
    // Address and control, which may be left out.
    let frame = frame.strip_prefix(&[0xff, 0x03]).unwrap_or(frame);
    match frame {
        [0x00, 0x21 | 0x57, rest @ ..] => Ok(rest),
        // The number in one byte.
        [0x21 | 0x57, rest @ ..] => Ok(rest),
        [] | [0x00] => Err(Unread::CutOff),
        _ => Err(Unread::NoIp),
    }
}

fn be_u16(octets: &[u8]) -> Option<u16> {
    octets.first_chunk().map(|two| u16::from_be_bytes(*two))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IP: &[u8] = &[0x45, 1, 2, 3];

    #[test]
    fn ip_is_found_behind_every_link() {
        let ethernet = |rest: &[u8]| [&[2; 12], rest, IP].concat();
        for (link, frame) in [
            (0, [&[2, 0, 0, 0], IP].concat()),
            (0, [&[0, 0, 0, 2], IP].concat()),
            (0, [&[30, 0, 0, 0], IP].concat()),
            (108, [&[0, 0, 0, 24], IP].concat()),
            (1, ethernet(&[0x08, 0])),
            (1, ethernet(&[0x86, 0xdd])),
            (1, ethernet(&[0x81, 0, 0, 7, 0x08, 0])),
            (1, ethernet(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 0x08, 0])),
            (1, ethernet(&[0x88, 0x47, 0, 1, 0, 64, 0, 2, 1, 64])),
            (1, ethernet(&[0x88, 0x64, 0x11, 0, 0, 1, 0, 6, 0, 0x21])),
            (9, [&[0xff, 3, 0, 0x21], IP].concat()),
            (9, [&[0, 0x57], IP].concat()),
            (50, [&[0xff, 3, 0x21], IP].concat()),
            (51, [&[0x11, 0, 0, 1, 0, 6, 0, 0x21], IP].concat()),
            (12, IP.to_vec()),
            (14, IP.to_vec()),
            (101, IP.to_vec()),
            (228, IP.to_vec()),
            (229, IP.to_vec()),
            (104, [&[0x0f, 0, 0x08, 0], IP].concat()),
            (113, [&[0; 14], &[8, 0][..], IP].concat()),
            (276, [&[8, 0][..], &[0; 18], IP].concat()),
        ] {
            assert_eq!(ip_packet(link, &frame), Ok(IP), "link {link}: {frame:02x?}");
            let header = frame.len() - IP.len();
            if header > 0 && ![9, 50, 51].contains(&link) {
                let short = &frame[..header - 1];
                assert!(ip_packet(link, short).is_err(), "link {link}: {short:02x?}");
            }
        }
    }

    #[test]
    fn what_is_no_ip_is_named() {
        for (link, frame, unread) in [
            (1, [&[2; 12][..], &[0x08, 0x06, 0, 1]].concat(), Unread::NoIp),
            (1, vec![2; 13], Unread::CutOff),
            (0, vec![7, 0, 0, 0, 1], Unread::NoIp),
            (9, vec![0xff, 3, 0xc0, 0x21, 1], Unread::NoIp),
            (105, IP.to_vec(), Unread::Link(105)),
            (-1, IP.to_vec(), Unread::Link(-1)),
        ] {
            assert_eq!(ip_packet(link, &frame), Err(unread), "{link} {frame:02x?}");
        }
    }

    proptest! {
        #[test]
        fn any_frame_of_any_link_is_read_without_panic(
            link in prop_oneof![0i32..300, any::<i32>()],
            frame in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let _ = ip_packet(link, &frame);
        }

        #[test]
        fn tags_and_labels_have_an_end(tag in prop_oneof![Just([0x81u8, 0]), Just([0x88, 0x47])], n in 0usize..100) {
            let frame = [&[2; 12][..], &[tag, [0, 0]].concat().repeat(n)].concat();
            let _ = ip_packet(1, &frame);
        }
    }
}
