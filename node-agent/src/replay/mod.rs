//! Replaying a recording where its reader is: no cluster, no KVM, no file is changed.
//!
//! | file | what |
//! |---|---|
//! | `file` | a recording's file becomes a machine and what happened to it |
//! | `instant` | positions, wall clocks and addresses for people |
//! | `symbols` | names of addresses |
//! | `verdict` | is the replay what was recorded? |
//! | `again` | the same span executed in two ways |
//! | `flip` | what another beginning changes: a flipped bit, another file |
//! | `differences` | in what two machines differ, by name |
//! | `history` | a timeline as gdb and its `monitor` see it |
//! | `gdb` | gdb's protocol |
//! | `program` | the binary `vm-replay`: what is asked, in order |
//!
//! What is read here came from somebody else: a refusal names the place, and nothing panics. This room refuses to know
//! clusters, agents and runners.

pub mod again;
pub mod differences;
pub mod file;
pub mod flip;
pub mod gdb;
pub mod history;
pub mod instant;
pub mod program;
pub mod symbols;
pub mod verdict;
