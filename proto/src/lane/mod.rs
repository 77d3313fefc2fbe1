//! How the `Lane` call carries frames without copying them, both ways; the rest of the call is tonic's.
//!
//! - [`envelope`]: what is around a frame, and calls whose body is made of finished envelopes.
//! - [`inbound`]: the messages of a call as they arrive.
//!
//! What is in a frame is not known here, nor who sends it.

mod envelope;
mod inbound;

pub use envelope::{Buffers, Posting, begin, enclose};
pub use inbound::{Aside, Inbound};
