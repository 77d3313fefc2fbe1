//! The guest of `bench replay`: Debian's kernel on a machine behind its door, with a disk, and a host at the other end of its
//! cable that pings it. Runs in this process, so that what is compared is the engine and nothing else.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use proto::v1::{BootSource, DiskConfig, MachineConfig, NetConfig};
use vmcb_engine::device::block::DiskImage;
use vmcb_engine::device::net::{Link, NetLink};
use vmcb_engine::journal::RecordingId;
use vmcb_engine::machine::{Machine, Outcome, Parts};
use vmcb_engine::memory::{GuestMemory, sized_memfd};
use vmcb_engine::replay::{Door, WhenFull};

use super::GUEST_PATIENCE;

/// Instructions between two looks, as a runner does it.
const SLICE: u64 = 500_000;
/// A block of the journal is closed after so much host time, as a runner does it.
const BLOCK: Duration = Duration::from_secs(2);
/// Its disk.
pub const DISK_BYTES: u64 = 64 << 20;
/// Its RAM.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// What the kernel is told.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 godwit.work=off";
/// What it prints when it is at its shell.
pub const UP: &str = "godwit: up";
/// What it prints when typed work is done. The shell echoes what is typed: the mark must not be in it.
pub const DONE: &str = "fin2";
/// Typed work: a shell that counts.
pub const COUNT: &str = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; echo fin$((1+1))\n";
/// Typed work: the disk read and written three times.
pub const READ_AND_WRITE: &str = "for i in 1 2 3; do dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; \
     dd if=/dev/zero of=/dev/vda bs=64k count=512 conv=fsync 2>/dev/null; done; echo fin$((1+1))\n";
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Packets that the guest sent.
type Wire = Rc<RefCell<VecDeque<Vec<u8>>>>;

struct Cable(Wire);

impl Link for Cable {
    fn send(&mut self, packet: &[u8]) {
        self.0.borrow_mut().push_back(packet.to_vec());
    }
}

/// The files of `deploy/guest`.
pub struct Files {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
}

impl Files {
    /// Reads them; `None` if there are none.
    pub fn read(guest: &Path) -> Option<Files> {
        let kernel = std::fs::read(guest.join("vmlinuz")).ok()?;
        let initrd = std::fs::read(guest.join("initramfs.cpio")).ok()?;
        Some(Files { kernel, initrd })
    }
}

/// A guest that is being measured.
pub struct Guest {
    /// The machine.
    pub door: Door,
    wire: Wire,
    console: String,
    closed_at: Instant,
    journal: Vec<Vec<u8>>,
    pings: u64,
    answers: u64,
}

/// Which load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Load {
    /// From the first instruction to the shell.
    Boot,
    /// A shell that counts.
    Cpu,
    /// Pings, one after the other, from the host.
    Net,
    /// Reading and writing the disk.
    Disk,
}

impl Load {
    /// All, with their names.
    pub const ALL: [(&'static str, Load); 4] =
        [("boot", Load::Boot), ("cpu", Load::Cpu), ("net", Load::Net), ("disk", Load::Disk)];
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn config() -> MachineConfig {
    let cmdline = CMDLINE.into();
    MachineConfig {
        vcpus: 1,
        memory_bytes: MEMORY_BYTES,
        cpu_model: "soft-v1".into(),
        engine: "soft".into(),
        boot: Some(BootSource { cmdline, ..BootSource::default() }),
        disks: vec![DiskConfig { size_bytes: DISK_BYTES, ..DiskConfig::default() }],
        nets: vec![NetConfig { tap: "bench".into(), mac: GUEST_MAC.to_vec() }],
        seed: vec![7; 32],
        epoch_ns: 1_700_000_000_000_000_000,
        tsc_hz: 1_000_000_000,
        tsc_per_instruction: 4,
        ..MachineConfig::default()
    }
}

impl Guest {
    /// A guest before its first instruction.
    ///
    /// # Errors
    /// The host's.
    pub fn new(files: &Files) -> Result<Guest, String> {
        let wire = Wire::default();
        let cable: NetLink = Box::new(Cable(Rc::clone(&wire)));
        let machine = Self::build(Some(cable))?;
        let mut door = Door::new(machine);
        door.boot(&files.kernel, Some(&files.initrd)).map_err(text)?;
        let (console, journal) = (String::new(), Vec::new());
        Ok(Guest { door, wire, console, closed_at: Instant::now(), journal, pings: 0, answers: 0 })
    }

    /// The same machine once more, before its first instruction, with nothing at the other end of its cable.
    ///
    /// # Errors
    /// The host's.
    fn build(cable: Option<NetLink>) -> Result<Machine, String> {
        let disk = sized_memfd("bench-disk", DISK_BYTES).map_err(text)?;
        let parts = Parts {
            memory: GuestMemory::create(MEMORY_BYTES).map_err(text)?,
            disks: vec![DiskImage::from_fd(disk, false).map_err(text)?],
            nets: vec![cable],
        };
        Machine::build(&config(), parts).map_err(text)
    }

    /// A copy of the machine as it is now, to be replayed from here. A segment of the recording begins.
    ///
    /// # Errors
    /// The machine's.
    pub fn copy(&mut self) -> Result<Machine, String> {
        let sections = self.door.capture().map_err(text)?;
        let mut copy = Self::build(None)?;
        let mut bytes = vec![0; 1 << 20];
        let memory = self.door.machine().memory();
        for gpa in (0..MEMORY_BYTES).step_by(bytes.len()) {
            memory.read(gpa, &mut bytes).map_err(text)?;
            if bytes.iter().any(|byte| *byte != 0) {
                copy.memory().write(gpa, &bytes).map_err(text)?;
            }
        }
        copy.apply(&sections).map_err(text)?;
        Ok(copy)
    }

    /// Records from now on.
    ///
    /// # Errors
    /// The door's.
    pub fn record(&mut self) -> Result<(), String> {
        self.door.record(RecordingId([1; 16]), 1 << 30, WhenFull::End).map_err(text)
    }

    /// What was recorded: whole frames.
    pub fn journal(&mut self) -> &[Vec<u8>] {
        self.door.close_block();
        self.take();
        &self.journal
    }

    /// Bytes of what was recorded.
    pub fn journal_bytes(&mut self) -> u64 {
        self.journal().iter().map(|frame| frame.len() as u64).sum()
    }

    fn take(&mut self) {
        let mut from = self.door.info().map_or(0, |info| info.first_kept);
        loop {
            let blocks = self.door.take(from);
            if blocks.is_empty() {
                return;
            }
            from += blocks.len() as u64;
            self.journal.extend(blocks);
        }
    }

    /// Answers a ping with the next one, as long as some are left.
    fn answer(&mut self) {
        loop {
            let packet = self.wire.borrow_mut().pop_front();
            let Some(packet) = packet else { return };
            if packet.get(12..14) == Some(&[8, 6]) && packet.len() >= 42 && packet[21] == 1 {
                self.door.net_input(0, &arp_reply(&packet));
                continue;
            }
            let reply = packet.get(12..14) == Some(&[8, 0]) && packet.get(23) == Some(&1) && packet.get(34) == Some(&0);
            if reply {
                self.answers += 1;
                if self.pings > 0 {
                    self.ping();
                }
            }
        }
    }

    /// An echo request of 1000 bytes.
    fn ping(&mut self) {
        self.pings -= 1;
        let mut packet = [&GUEST_MAC[..], &HOST_MAC, &[8, 0]].concat();
        let header = [0x45, 0, 4, 4, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend(with_checksum(header.to_vec(), 10));
        let mut icmp = vec![8, 0, 0, 0, 0, 1];
        icmp.extend((self.pings as u16).to_be_bytes());
        icmp.resize(8 + 1000, 0x5a);
        packet.extend(with_checksum(icmp, 2));
        self.door.net_input(0, &packet);
    }

    /// Runs for one slice.
    ///
    /// # Errors
    /// The guest ended.
    fn slice(&mut self, idle: bool) -> Result<(), String> {
        self.answer();
        let until = self.door.machine().retired() + SLICE;
        let outcome = self.door.run(until);
        let said = self.door.machine_mut().take_console_output();
        self.console += &String::from_utf8_lossy(&said);
        if self.closed_at.elapsed() >= BLOCK {
            self.door.close_block();
            self.take();
            self.closed_at = Instant::now();
        }
        match outcome {
            Outcome::Reached => Ok(()),
            Outcome::Idle { .. } if !self.wire.borrow().is_empty() => Ok(()),
            Outcome::Idle { until_tsc: Some(tsc) } if idle => {
                self.door.skip_idle_until(tsc);
                Ok(())
            }
            other => Err(format!("the guest ended: {other:?}\n{}", self.console)),
        }
    }

    /// Runs until the console says something.
    ///
    /// # Errors
    /// It does not.
    pub fn until(&mut self, mark: &str) -> Result<(), String> {
        let begun = Instant::now();
        while !self.console.contains(mark) {
            if begun.elapsed() > GUEST_PATIENCE {
                return Err(format!("the guest did not print {mark:?} in {GUEST_PATIENCE:?}:\n{}", self.console));
            }
            self.slice(true)?;
        }
        Ok(())
    }

    /// Lets an idle guest's time pass, closing a block every two seconds of it as a runner does.
    ///
    /// # Errors
    /// The guest ended.
    pub fn idle(&mut self, guest: Duration) -> Result<(), String> {
        let ticks = |time: Duration| time.as_nanos() as u64;
        let end = self.door.machine().tsc() + ticks(guest);
        let mut block = self.door.machine().tsc() + ticks(BLOCK);
        while self.door.machine().tsc() < end {
            self.slice(true)?;
            if self.door.machine().tsc() >= block {
                self.door.close_block();
                block += ticks(BLOCK);
            }
        }
        self.take();
        Ok(())
    }

    /// Types a line at the shell.
    ///
    /// # Errors
    /// The guest ended.
    pub fn type_in(&mut self, line: &str) -> Result<(), String> {
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            let taken = self.door.console_input(rest);
            rest = &rest[taken..];
            self.slice(true)?;
        }
        Ok(())
    }

    /// Does the work of a load; the guest is at its shell, unless it boots.
    ///
    /// # Errors
    /// It does not finish.
    pub fn work(&mut self, load: Load) -> Result<(), String> {
        match load {
            Load::Boot => return self.until(UP),
            Load::Cpu => self.type_in(COUNT)?,
            Load::Disk => self.type_in(READ_AND_WRITE)?,
            Load::Net => {
                self.type_in("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; echo net$((1+1))\n")?;
                self.until("net2")?;
                self.pings = 20_000;
                let wanted = self.answers + self.pings;
                self.ping();
                let begun = Instant::now();
                while self.answers < wanted {
                    if begun.elapsed() > GUEST_PATIENCE {
                        return Err(format!("{} of {wanted} pings were answered", self.answers));
                    }
                    self.slice(true)?;
                    self.answer();
                }
                return Ok(());
            }
        }
        self.until(DONE)
    }
}

/// The host's answer to a question for its address.
fn arp_reply(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer.copy_within(6..12, 0);
    answer[6..12].copy_from_slice(&HOST_MAC);
    answer[21] = 2;
    answer[22..28].copy_from_slice(&HOST_MAC);
    answer[28..32].copy_from_slice(&question[38..42]);
    answer[32..42].copy_from_slice(&question[22..32]);
    answer
}

/// The Internet checksum of `bytes`, put at `at`.
fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = !((folded & 0xffff) + (folded >> 16)) as u16;
    bytes[at..at + 2].copy_from_slice(&folded.to_be_bytes());
    bytes
}
