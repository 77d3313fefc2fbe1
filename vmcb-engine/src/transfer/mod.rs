//! What a transfer of pages decides and computes, without the wire: [`rounds`] (go on or stop?), [`runs`] (pages to
//! frames), [`receive`] (frames to pages).
//!
//! Numbers and bytes in, decisions and bytes out. This room refuses to know lanes, acknowledgements, time other than
//! the numbers it is given, and who the other side is.

pub mod receive;
pub mod rounds;
pub mod runs;
