//! What the process of a guest gives up before it serves: privileges, then system calls.
//!
//! Everything is opened first; afterwards the process needs memory, its two threads and the descriptors it holds. A
//! guest that breaks out of the engine finds a user of its own without groups, no way to gain privileges, and a
//! seccomp filter (seccomp(2)) that kills the process at anything but the calls listed here. Executable memory can
//! neither be mapped nor made.

use super::faults::UNREGISTER_REQUEST;
use rustix::process::{DumpableBehavior, Gid, Uid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// First of the users that guests run as when the runner is started by root; one of 2^24, by the guest's directory.
const UID_FIRST: u32 = 1_610_612_736;
const UIDS: u32 = 1 << 24;
/// Where that user is not mapped (a user namespace).
const NOBODY: u32 = 65_534;

/// Why the sandbox could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Privileges could not be dropped.
    #[error("{step}; set `sandbox = false` if this host cannot do it")]
    Privileges {
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: rustix::io::Errno,
    },
    /// The filter could not be installed.
    #[error("seccomp filter; set `sandbox = false` if this host cannot do it")]
    Filter(#[from] seccompiler::Error),
}

impl From<seccompiler::BackendError> for SandboxError {
    fn from(error: seccompiler::BackendError) -> Self {
        SandboxError::Filter(error.into())
    }
}

/// The user of a guest whose directory this is.
pub fn user_of(directory: &std::path::Path) -> u32 {
    let hash = blake3::hash(directory.as_os_str().as_encoded_bytes());
    let [a, b, c, ..] = *hash.as_bytes();
    UID_FIRST + u32::from_le_bytes([a, b, c, 0]) % UIDS
}

/// Drops groups and user of the calling thread; must be called before other threads are made. A process that is not
/// root keeps its user.
///
/// # Errors
/// [`SandboxError::Privileges`].
pub fn drop_privileges(user: u32) -> Result<(), SandboxError> {
    let failed = |step| move |source| SandboxError::Privileges { step, source };
    if rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_groups(&[]).map_err(failed("setgroups"))?;
        become_user(user).or_else(|_| become_user(NOBODY)).map_err(failed("setresuid"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("PR_SET_DUMPABLE"))
}

fn become_user(user: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

/// Calls that both threads may make with any arguments.
const CALLS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What a guest's process needs of the kernel to run it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hardware {
    /// Nothing: the software engine.
    None,
    /// The calls of KVM on the descriptors that it holds.
    Kvm,
}

/// Bits 15:8 of a request are its driver's (ioctl(2)); this is KVM's.
const KVM_REQUESTS: u64 = 0xae00;

/// The filter, compiled for this processor.
///
/// # Errors
/// [`SandboxError::Filter`].
pub fn filter(hardware: Hardware) -> Result<BpfProgram, SandboxError> {
    let without_exec = || {
        let exec = u64::try_from(libc::PROT_EXEC).unwrap_or(4);
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(exec), 0)?;
        SeccompRule::new(vec![condition])
    };
    let empty_path_statx = {
        // statx of an open descriptor: the kernel takes AT_EMPTY_PATH (0x1000) with an empty path.
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(0x1000), 0x1000)?;
        SeccompRule::new(vec![condition])?
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![without_exec()?]);
    rules.insert(libc::SYS_mprotect, vec![without_exec()?]);
    let give_up = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, UNREGISTER_REQUEST.into())?;
    let mut requests = vec![SeccompRule::new(vec![give_up])?];
    if hardware == Hardware::Kvm {
        let of_kvm = SeccompCmpOp::MaskedEq(0xff00);
        requests.push(SeccompRule::new(vec![SeccompCondition::new(
            1,
            SeccompCmpArgLen::Dword,
            of_kvm,
            KVM_REQUESTS,
        )?])?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    rules.insert(libc::SYS_statx, vec![empty_path_statx]);
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?;
    Ok(filter.try_into()?)
}

/// Installs the filter on every thread of the process, and keeps its allocator from calls that the filter does not know.
///
/// # Errors
/// [`SandboxError::Filter`].
pub fn seal(hardware: Hardware) -> Result<(), SandboxError> {
    proto::heap::never_shrink();
    Ok(seccompiler::apply_filter_all_threads(&filter(hardware)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::faults::Missing;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use vmcb_engine::memory::GuestMemory;

    /// What the child of the tests below does, by `GODWIT_SANDBOX_CHILD`; in an ordinary run it does nothing.
    #[test]
    fn child() {
        let Ok(deed) = std::env::var("GODWIT_SANDBOX_CHILD") else { return };
        let memory = GuestMemory::create(16 << 20).unwrap();
        let missing = Missing::watch(memory.mappings());
        let (sealed, told) = std::sync::mpsc::channel();
        let (started, running) = std::sync::mpsc::channel();
        let frees = std::thread::spawn(move || {
            started.send(()).unwrap();
            let _sealed = told.recv();
            // Too small for mappings of their own: the thread's heap grows by them, and its end is free again afterwards.
            drop(std::hint::black_box([(); 300].map(|()| vec![1u8; 100 << 10])));
        });
        // As in a runner: what a thread does once it does before the filter.
        running.recv().unwrap();
        seal(if deed.starts_with("kvm") { Hardware::Kvm } else { Hardware::None }).unwrap();
        match deed.as_str() {
            // Where the host permits no userfaultfd there is nothing to give up.
            "give-up" => missing.iter().for_each(|missing| missing.give_up().unwrap()),
            "ioctl" | "kvm-ioctl" => drop(rustix::termios::tcgetwinsize(rustix::stdio::stdin())),
            "allowed" => drop(vec![1u8; 8 << 20]),
            "free" => {
                sealed.send(()).unwrap();
                frees.join().unwrap();
            }
            "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "open" => drop(std::fs::File::open("/etc/passwd")),
            "exec" => drop(Command::new("/bin/true").status()),
            other => panic!("{other}"),
        }
        rustix::io::write(rustix::stdio::stdout(), b"survived\n").unwrap();
        // The test harness makes calls that a runner does not; end before it does.
        std::process::exit(0);
    }

    fn run(deed: &str) -> (Option<i32>, bool) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["runner::sandbox::tests::child", "--exact", "--nocapture", "--test-threads=1"])
            .env("GODWIT_SANDBOX_CHILD", deed)
            .output()
            .unwrap();
        (output.status.signal(), String::from_utf8_lossy(&output.stdout).contains("survived"))
    }

    #[test]
    fn a_forbidden_call_kills_the_process() {
        for deed in ["socket", "open", "exec", "ioctl", "kvm-ioctl"] {
            assert_eq!(run(deed), (Some(libc::SIGSYS), false), "{deed}");
        }
    }

    #[test]
    fn ordinary_work_goes_on() {
        for deed in ["allowed", "give-up", "free"] {
            assert_eq!(run(deed), (None, true), "{deed}");
        }
    }

    #[test]
    fn guests_have_users_of_their_own() {
        let one = user_of(std::path::Path::new("/var/lib/godwit/vms/vm1"));
        let two = user_of(std::path::Path::new("/var/lib/godwit/vms/vm2"));
        assert_ne!(one, two);
        assert!(one >= UID_FIRST && two >= UID_FIRST);
    }
}
