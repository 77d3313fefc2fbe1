//! Ethernet frames that tell switches and neighbours where a guest's MAC address lives now.
//!
//! After a migration the bridges between the hosts still send to the old port until they see a frame from the guest.
//! A RARP request (RFC 903) and an ARP announcement (RFC 826, RFC 5227 2.3) from the guest's MAC teach them at once.
//! The guest's IP address is not known to a host, so the ARP frame carries none: it moves the MAC, not the mapping.

/// Shortest Ethernet frame without its checksum.
const FRAME_BYTES: usize = 60;

fn frame(mac: [u8; 6], ethertype: u16, operation: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_BYTES);
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    // Hardware type Ethernet, protocol IPv4, address lengths 6 and 4.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac);
    frame.resize(FRAME_BYTES, 0);
    frame
}

/// The frames that announce a card, in the order in which they are sent.
pub fn frames(mac: [u8; 6]) -> [Vec<u8>; 2] {
    // RARP: EtherType 0x8035, operation 3 "reverse request". ARP: EtherType 0x0806, operation 1 "request".
    [frame(mac, 0x8035, 3), frame(mac, 0x0806, 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_broadcast_from_the_guest() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        for (frame, ethertype) in frames(mac).iter().zip([[0x80, 0x35], [0x08, 0x06]]) {
            assert_eq!(frame.len(), 60);
            assert_eq!(frame[..6], [0xff; 6]);
            assert_eq!(frame[6..12], mac);
            assert_eq!(frame[12..14], ethertype);
            assert_eq!(frame[22..28], mac);
        }
    }
}
