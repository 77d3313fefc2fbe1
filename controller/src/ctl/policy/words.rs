//! The words of `ctl policy`: clap's derive over plain values, and the policy that they mean.

use std::time::Duration;

use clap::{Args, Subcommand};
use proto::v1::{CheckpointPolicy, CheckpointsKept, DayWindow};

use crate::ctl::failure::Failure;
use crate::ctl::units;
use crate::retention::policy;

/// `ctl policy ...`
#[derive(Subcommand, Debug)]
pub enum PolicyCommand {
    /// Make checkpoints of a VM by the clock, and keep those that the rules name.
    ///
    /// Without any `--keep-...` all are kept.
    ///
    /// The newest that is sound is always kept, and those made by hand until `ctl checkpoint rm`.
    Set(SetArgs),
    /// All policies, or that of one VM, and how they go.
    Ls {
        /// Name of the VM.
        vm: Option<String>,
    },
    /// No checkpoints by the clock any more; those that are there stay.
    Rm {
        /// Name of the VM.
        vm: String,
    },
    /// What would be kept over time: of a VM's policy, or of one that is only given here.
    Simulate(SimulateArgs),
}

/// `ctl policy set`
#[derive(Args, Debug)]
pub struct SetArgs {
    /// Name of the VM.
    pub vm: String,
    /// From the beginning of one checkpoint to that of the next; 10s is the shortest.
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    pub every: Duration,
    /// Up to this much earlier, so that many VMs spread [default: a tenth of the interval].
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    pub jitter: Option<Duration>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "options shared with `simulate`")]
    pub rules: Rules,
    /// Hash a random sample of the VM's packs again, so often [default: never].
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    pub verify_every: Option<Duration>,
    /// Drill the newest sound checkpoint (`ctl checkpoint drill`) on any host, so often [default: never].
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    pub drill_every: Option<Duration>,
}

/// When, and which are kept.
#[derive(Args, Debug, Default)]
pub struct Rules {
    /// Time of the day in which checkpoints may begin, for example 22:00-06:00 [default: always].
    #[arg(long = "window", value_parser = window, value_name = "FROM-TO")]
    pub windows: Vec<DayWindow>,
    /// Time zone of windows and of hours, days, weeks and months, for example Europe/Berlin [default: UTC].
    #[arg(long, value_name = "NAME")]
    pub zone: Option<String>,
    /// Keep the last N.
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub keep_last: u32,
    /// Keep the newest of each of the last N hours that have any.
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub keep_hourly: u32,
    /// The same of days.
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub keep_daily: u32,
    /// The same of ISO weeks.
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub keep_weekly: u32,
    /// The same of months.
    #[arg(long, default_value_t = 0, value_name = "N", hide_default_value = true)]
    pub keep_monthly: u32,
}

/// `ctl policy simulate`
#[derive(Args, Debug)]
pub struct SimulateArgs {
    /// A VM whose policy is simulated, beginning with the checkpoints that it has.
    #[arg(required_unless_present = "every", conflicts_with_all = ["every", "windows", "zone", "keep_last",
        "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly"])]
    pub vm: Option<String>,
    /// Interval of a policy that is only given here.
    #[arg(long, value_parser = units::duration, value_name = "TIME")]
    pub every: Option<Duration>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "options shared with `set`")]
    pub rules: Rules,
    /// How long.
    #[arg(long = "for", default_value = "90d", value_parser = units::duration, value_name = "TIME")]
    pub span: Duration,
}

fn window(text: &str) -> Result<DayWindow, String> {
    policy::parse_window(text).map_err(|failure| failure.message)
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A policy of these words.
///
/// # Errors
/// It cannot be carried out.
pub fn policy(every: Duration, jitter: Option<Duration>, rules: &Rules) -> Result<CheckpointPolicy, Failure> {
    let policy = CheckpointPolicy {
        every_ms: ms(every),
        jitter_ms: jitter.map_or(ms(every) / 10, ms),
        windows: rules.windows.clone(),
        zone: rules.zone.clone().unwrap_or_default(),
        keep: Some(CheckpointsKept {
            last: rules.keep_last,
            hourly: rules.keep_hourly,
            daily: rules.keep_daily,
            weekly: rules.keep_weekly,
            monthly: rules.keep_monthly,
        }),
        ..CheckpointPolicy::default()
    };
    policy::check(&policy).map_err(refused)?;
    Ok(policy)
}

impl SetArgs {
    /// The policy that is meant.
    ///
    /// # Errors
    /// It cannot be carried out.
    pub fn policy(&self) -> Result<CheckpointPolicy, Failure> {
        let policy = policy(self.every, self.jitter, &self.rules)?;
        let (verify_every_ms, drill_every_ms) = (self.verify_every.map_or(0, ms), self.drill_every.map_or(0, ms));
        let policy = CheckpointPolicy { verify_every_ms, drill_every_ms, ..policy };
        policy::check(&policy).map_err(refused)?;
        Ok(policy)
    }
}

/// The other form of a failure.
fn refused(failure: crate::failure::Failure) -> Failure {
    let refused = Failure::new(failure.code, failure.message);
    if failure.hint.is_empty() { refused } else { refused.hint(failure.hint) }
}
