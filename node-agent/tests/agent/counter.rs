//! A runner process with a guest that counts: RAM is real, its instructions write one page after the other.
//!
//! The agent starts a script that starts this test binary again with [`ARGUMENTS`] set; [`runner_process`] then lives
//! the life of `vm-runner`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use node_agent::runner::guest::{Debugged, Guest, Outcome, Place};
use node_agent::runner::open::Opened;
use node_agent::runner::{Built, Options, run};
use proto::v1::{MachineConfig, Section};
use vmcb_engine::engine::Stops;
use vmcb_engine::memory::{GuestMemory, sized_memfd};
use vmcb_engine::replay::Door;

const ARGUMENTS: &str = "GODWIT_TEST_RUNNER";

/// Writes the script that is given to agents as their runner.
pub fn program(directory: &Path) -> PathBuf {
    let path = directory.join("runner.sh");
    let test = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\n{ARGUMENTS}=\"$*\" exec {} counter::runner_process --exact --nocapture --test-threads=1\n",
        test.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

struct Counter {
    memory: GuestMemory,
    count: u64,
    idle: bool,
    said: Vec<u8>,
    power_off: bool,
}

impl Debugged for Counter {
    fn read_cpu(&self, vcpu: usize) -> Option<Vec<u8>> {
        (vcpu == 0).then(Vec::new)
    }

    fn write_cpu(&mut self, _: usize, _: &[u8]) -> Result<(), String> {
        Err("this guest has no registers".into())
    }

    fn read_memory(&self, _: Place, _: &mut [u8]) -> usize {
        0
    }

    fn write_memory(&mut self, _: Place, _: &[u8]) -> Result<(), String> {
        Err("this guest has no memory".into())
    }

    fn set_stops(&mut self, _: &Stops) {}

    fn pass_breakpoints(&mut self) {}

    fn current_vcpu(&self) -> usize {
        0
    }

    fn last_ran(&self, _: usize) -> Option<u64> {
        Some(Guest::retired(self))
    }
}

impl Guest for Counter {
    fn door(&self) -> Option<&Door> {
        None
    }

    fn door_mut(&mut self) -> Option<&mut Door> {
        None
    }

    fn boot(&mut self, kernel: &[u8], _initrd: Option<&[u8]>) -> Result<(), String> {
        self.memory.write(0, kernel).map_err(|error| error.to_string())?;
        self.said.extend_from_slice(b"booted\n");
        Ok(())
    }

    fn reset(&mut self, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(), String> {
        self.memory.clear().map_err(|error| error.to_string())?;
        self.boot(kernel, initrd)
    }

    fn run(&mut self, until_retired: u64) -> Outcome {
        if self.power_off {
            return Outcome::PowerOff;
        }
        if self.idle {
            self.idle = false;
            self.count = until_retired.min(self.count + 1000);
            let page = self.count / 1000 % (self.memory.pages() - 1) + 1;
            self.memory.write(page * 4096, &self.count.to_le_bytes()).unwrap();
            return Outcome::Reached;
        }
        self.idle = true;
        Outcome::Idle { until_tsc: Some(self.tsc() + 100_000) }
    }

    fn skip_idle_until(&mut self, _tsc: u64) {}

    fn retired(&self) -> u64 {
        self.count
    }

    fn tsc(&self) -> u64 {
        self.count * 1000
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        self.said.extend_from_slice(b"you said ");
        self.said.extend_from_slice(bytes);
        self.power_off |= bytes.starts_with(b"poweroff");
        bytes.len()
    }

    fn console_room(&self) -> usize {
        64 << 10
    }

    fn take_console_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.said)
    }

    fn net_input(&mut self, _card: usize, _packet: &[u8]) -> bool {
        false
    }

    fn net_hold(&mut self, _card: usize, _packet: &[u8]) -> bool {
        false
    }

    fn epoch(&self) -> u32 {
        self.memory.epoch()
    }

    fn advance_epoch(&mut self) -> Result<u32, String> {
        Ok(self.memory.advance_epoch())
    }

    fn freeze(&mut self, mark: u32) -> Result<u32, String> {
        let epoch = self.memory.advance_epoch();
        self.memory.keeper().freeze(mark, epoch - 1).map_err(|error| error.to_string())?;
        Ok(epoch)
    }

    fn thaw(&mut self) -> bool {
        self.memory.keeper().thaw()
    }

    fn kept_bytes(&self) -> u64 {
        self.memory.keeper().kept_bytes()
    }

    fn capture(&mut self) -> Result<Vec<Section>, String> {
        let body = [self.count.to_le_bytes().as_slice(), &[u8::from(self.idle)]].concat();
        Ok(vec![Section { name: "clock".into(), major: 1, body, ..Section::default() }])
    }

    fn apply(&mut self, sections: &[Section]) -> Result<(), String> {
        let [section] = sections else { return Err("one section is needed".into()) };
        let (count, idle) = section.body.split_first_chunk().ok_or("the section is cut")?;
        self.count = u64::from_le_bytes(*count);
        self.idle = idle == [1];
        // What was counted must have travelled with the RAM.
        let mut page = [0; 8];
        let at = (self.count / 1000 % (self.memory.pages() - 1) + 1) * 4096;
        self.memory.read(at, &mut page).map_err(|error| error.to_string())?;
        if u64::from_le_bytes(page) != self.count && self.count > 0 {
            return Err(format!("the page at {at:#x} says {}, not {}", u64::from_le_bytes(page), self.count));
        }
        Ok(())
    }

    fn vmcbs(&self) -> Result<Vec<Box<[u8; 4096]>>, String> {
        Ok(vec![Box::new([0x5a; 4096])])
    }
}

fn build(config: &MachineConfig, opened: &Opened) -> Result<Built<Counter>, String> {
    let memory = GuestMemory::create(config.memory_bytes).map_err(|error| error.to_string())?;
    let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| error.to_string());
    let mut descriptors: Vec<(String, OwnedFd)> = vec![
        ("ram".into(), dup(memory.ram_fd())?),
        ("ram-stamps".into(), dup(memory.stamps_fd())?),
        ("ram-kept".into(), dup(memory.keeper().fd())?),
    ];
    if let Some(boot) = &opened.boot_image {
        descriptors.push(("boot".into(), dup(boot.file.as_fd())?));
        let stamps = sized_memfd("boot-stamps", boot.bytes.div_ceil(4096) * 4).map_err(|error| error.to_string())?;
        descriptors.push(("boot-stamps".into(), stamps));
    }
    let guest = Counter { memory, count: 0, idle: false, said: Vec::new(), power_off: false };
    Ok(Built {
        guest,
        descriptors,
        macs: Vec::new(),
        state_digest: |s| vmcb_engine::snapshot::state_digest(s).0,
        missing: None,
    })
}

/// Does nothing in an ordinary run of the tests.
#[test]
fn runner_process() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let words: Vec<&str> = arguments.split(' ').collect();
    let directory = words.iter().position(|word| *word == "--dir").map(|at| PathBuf::from(words[at + 1])).unwrap();
    let options = Options { directory, incoming: words.contains(&"--incoming"), sandbox: false };
    let ended = run(&options, build);
    // Not back into the test harness.
    std::process::exit(i32::from(ended.is_err()));
}
