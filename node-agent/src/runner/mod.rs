//! The process of one guest.
//!
//! ```text
//! open: config.pb, memory, disks, taps, kernel, console.log, runner.sock       (as the agent's user)
//! sandbox: user of its own, no new privileges          -> I/O thread is made -> seccomp on both threads
//! vCPU threads on hardware (they take vCPUs and give them back); all are made before the filter
//! machine thread: driver (slices, pacing, lease, pause) <-- channels --> I/O thread: socket, log, taps
//! ```
//! It holds no network but its taps and no credentials, outlives the agent that started it, and takes the newest
//! connection on its socket as its agent. It refuses to know other guests, hosts and the controller.

pub mod announce;
pub mod console;
pub mod driver;
pub mod faults;
pub mod guest;
pub mod machine;
pub mod open;
pub mod pace;
pub mod sandbox;
pub mod serve;
pub mod tap;
pub mod wire;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proto::v1::{MachineConfig, Section};

use self::driver::{Cable, Driver, Terms};
use self::faults::Missing;
use self::guest::Guest;
use self::open::{OpenError, Opened, TapCable};
use self::sandbox::{Hardware, SandboxError};
use self::serve::{Mailbox, Ports, StandingAnswer};
use crate::clock::{Clock, HostClock};

/// How the process was called.
#[derive(Clone, Debug)]
pub struct Options {
    /// The VM's directory.
    pub directory: PathBuf,
    /// The state comes from outside: no kernel is opened.
    pub incoming: bool,
    /// Drop privileges and filter system calls.
    pub sandbox: bool,
}

/// Why the process ended.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// Something could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The machine could not be built.
    #[error("the machine cannot be built: {0}")]
    Build(String),
    /// The sandbox could not be made.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The system's answer.
    #[error("{step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The I/O thread ended by itself.
    #[error(transparent)]
    Closed(#[from] driver::Closed),
}

/// A machine that was built, with what the agent shares of it.
pub struct Built<G> {
    /// The machine.
    pub guest: G,
    /// "ram", "ram-stamps", then for each local disk "disk0", "disk0-stamps", ..., then "boot", "boot-stamps".
    pub descriptors: Vec<(String, OwnedFd)>,
    /// MAC address by card.
    pub macs: Vec<[u8; 6]>,
    /// State digest over sections.
    pub state_digest: fn(&[Section]) -> [u8; 32],
    /// Pages of RAM that the agent brings while the guest runs; its descriptor is the last of `descriptors`, "faults".
    pub missing: Option<Missing>,
}

/// Lives the life of the process. `build` makes the machine; it may open files.
///
/// # Errors
/// [`RunnerError`].
pub fn run<G: Guest>(
    options: &Options,
    build: impl FnOnce(&MachineConfig, &Opened) -> Result<Built<G>, String>,
) -> Result<(), RunnerError> {
    // A session of its own: signals to the agent's terminal or group do not reach the guest. Fails only if it leads one.
    let _already_leader = rustix::process::setsid();
    let opened = open::open(&options.directory, options.incoming)?;
    let built = build(&opened.config, &opened).map_err(RunnerError::Build)?;
    open::write_pid(&options.directory)?;
    if options.sandbox {
        sandbox::drop_privileges(sandbox::user_of(&options.directory))?;
    }

    let (inputs, taken) = std::sync::mpsc::channel();
    let (names, descriptors) = built.descriptors.into_iter().unzip();
    let cables = opened
        .taps
        .iter()
        .filter_map(|(card, tap)| {
            let cable: Box<dyn Cable> = Box::new(TapCable(tap.clone()));
            built.macs.get(*card).map(|mac| (cable, *mac))
        })
        .collect();
    let (config, missing) = (opened.config, built.missing);
    let hardware = if config.engine == "kvm" { Hardware::Kvm } else { Hardware::None };
    let standing_answer = missing.is_some().then(StandingAnswer::default);
    let ports = Ports {
        listener: opened.listener,
        log: opened.log,
        taps: opened.taps,
        descriptors,
        standing_answer: standing_answer.clone(),
    };
    let state_digest = built.state_digest;
    let terms = Terms { config, descriptors: names, state_digest, cables, missing, standing_answer };
    let system = |step| move |source| RunnerError::System { step, source };
    let mut guest = built.guest;
    guest.prepare().map_err(RunnerError::Build)?;
    let mailbox = Mailbox { inputs, bell: guest.bell() };
    let (server, outlet) = serve::join(ports, mailbox).map_err(|e| system("eventfd")(e.into()))?;
    let (started, running) = std::sync::mpsc::channel();
    let io = std::thread::Builder::new()
        .name("runner-io".to_owned())
        .spawn(move || {
            let _started = started.send(());
            server.run();
        })
        .map_err(system("start the I/O thread"))?;
    if options.sandbox {
        // What happens once and needs calls of its own happens before the filter: the thread gets its name (prctl),
        // the first look at the clock finds the vDSO (prctl PR_GET_AUXV).
        let _thread_runs = running.recv();
        let _found = HostClock.boottime_ns();
        sandbox::seal(hardware)?;
    }
    let mut driver = Driver::new(guest, HostClock, outlet, terms, opened.images);
    let served = driver.serve(&taken);
    // Dropping the driver closes the outlet: the I/O thread sends its last reply and ends.
    drop(driver);
    let _ended = io.join();
    Ok(served?)
}
