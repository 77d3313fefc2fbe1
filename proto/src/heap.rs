//! What this process's allocator does with memory that is given back to it.
//!
//! Pages of guests pass a process in buffers of a few hundred KiB that come and go thousands of times a second. glibc gives
//! each of them a mapping of its own, or gives the top of its heap back to the host as soon as it is free: every use then
//! begins with page faults, a sixth of all that a transfer costs. Processes that carry pages keep what they were given
//! ([`keep_freed`]); buffers of many MiB still go back at once. Other C libraries decide for themselves.
#![allow(unsafe_code, reason = "mallopt(3)")]

/// Larger pieces get mappings of their own, which go back to the host when they are freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: i32 = 4 << 20;
/// Free bytes at the top of a heap that are not given back.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: i32 = 32 << 20;

/// As large as a thread's heap of glibc can be: its free end is never so large.
#[cfg(target_env = "gnu")]
const HEAP_BYTES: i32 = 64 << 20;

/// Has heaps of threads never shrink. glibc, before it shrinks one for the first time, opens a file below `/proc`
/// (`vm/overcommit_memory`); a process that may open nothing dies of that. Large buffers have mappings of their own, which go back
/// all the same.
pub fn never_shrink() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: as below.
        let _unknown = unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_BYTES) };
    }
}

/// Lets the allocator keep freed buffers for the next ones. For the beginning of `main`; without it everything works, slower.
pub fn keep_freed() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, MAPPED_BYTES), (libc::M_TRIM_THRESHOLD, KEPT_BYTES)] {
        // SAFETY: mallopt(3) takes any numbers, may be called at any time, and returns 0 for what it does not know.
        let _unknown = unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(target_env = "gnu")]
#[cfg(test)]
mod tests {
    use super::*;

    /// Page faults of this thread so far that needed no disk (getrusage(2)).
    fn faults() -> i64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // Field 10 is the eighth after the name (proc_pid_stat(5)).
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(7).unwrap().parse().unwrap()
    }

    #[test]
    fn buffers_that_come_and_go_do_not_fault_each_time() {
        keep_freed();
        // As many at once as are under way on a few lanes.
        let fill =
            || -> usize { [(); 8].map(|()| std::hint::black_box(vec![1u8; 512 << 10])).iter().map(Vec::len).sum() };
        fill();
        let before = faults();
        let filled: usize = (0..16).map(|_| fill()).sum();
        let faulted = faults() - before;
        assert!(faulted < (filled / 4096 / 10) as i64, "{faulted} faults for {filled} bytes");
    }
}
