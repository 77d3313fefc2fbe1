//! The controller: the only holder of bucket credentials and of the ledger.
//!
//! ```text
//!   api  ->  saga  ->  agents   (calls to hosts)        ledger: what is true; one append is the commit of a hand-over
//!              |  \->  ingest   (lanes: to and from the bucket, and through)
//!              v       bucket  <-  journal  (blocks of recordings)
//!            ledger <- reconcile <- heartbeats
//! ```
//! It refuses to know guest memory, engines and devices: pages are bytes with a hash here. The daemon is wired in
//! [`cluster`]; only [`config`] reads settings.

pub mod abreast;
pub mod agents;
pub mod api;
pub mod bucket;
pub mod cluster;
pub mod config;
pub mod ctl;
pub mod entropy;
pub mod failure;
pub mod ingest;
pub mod journal;
pub mod keys;
pub mod ledger;
pub mod metrics;
pub mod reconcile;
pub mod retention;
pub mod saga;
pub mod schedule;
pub mod sweep;
pub mod tls;
