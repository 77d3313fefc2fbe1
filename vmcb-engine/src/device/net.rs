//! The other end of a network card's cable, as the card sees it.

/// Where packets of the guest go. They are Ethernet frames without checksum. Sending never waits: what does not fit is
/// dropped, as on a wire.
pub trait Link {
    /// One packet from the guest.
    fn send(&mut self, packet: &[u8]);
}

/// A cable; owned by the card.
pub type NetLink = Box<dyn Link>;
