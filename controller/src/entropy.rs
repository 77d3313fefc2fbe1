//! Random bytes for identifiers and ticket secrets, from the provider that TLS uses.
//!
//! The only place of the controller that draws randomness; everything else is handed its ids.

use rustls::crypto::SecureRandom;

/// `N` bytes that nobody can guess.
pub fn bytes<const N: usize>() -> [u8; N] {
    let provider = rustls::crypto::ring::default_provider();
    let random: &dyn SecureRandom = provider.secure_random;
    let mut bytes = [0; N];
    random.fill(&mut bytes).expect("the operating system's random source has no failure once the system is up");
    bytes
}
