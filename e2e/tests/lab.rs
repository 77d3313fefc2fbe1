//! Linux on `kvm_amd`, on an emulated AMD host: it boots, works on its disk with two processors, moves while it works, and
//! comes back from a checkpoint after its runner was killed; and a host that lacks an instruction says which. Where no host can
//! be emulated the tests say so and pass.

use std::time::Duration;

use e2e::lab::{EPYC, Lab};

/// How long a host may take, from power-up to power-off.
const PATIENCE: Duration = Duration::from_secs(900);

/// A cluster of two agents; `step` runs a command and says how it ended, `goes_on` waits until the guest has counted on.
const CLUSTER: &str = r#"
step() {
    if timeout 180 "$@" </dev/null >/tmp/said 2>&1; then echo "LAB: done: $*"; else echo "LAB: FAILED: $*"; cat /tmp/said; fi
}
beat() { ctl vm console vm1 --log 2>/dev/null | sed -n 's/.*godwit: beat \([0-9]*\) .*/\1/p' | tail -1; }
goes_on() {
    before=$(beat)
    for _ in $(seq 400); do
        now=$(beat)
        [ "${now:-0}" -ge $((${before:-0} + 3)) ] && echo "LAB: done: goes on $1" && return
        sleep 0.5
    done
    echo "LAB: FAILED: goes on $1"
    ctl vm console vm1 --log
    cat /tmp/c/logs/*
}
create() {
    step ctl vm create vm1 --host hostA --engine kvm --memory 128M --kernel /guest/vmlinuz --initrd /guest/initramfs.cpio \
        --cmdline "$(cat /guest/cmdline)" --disk /guest/disk.img --net tap= "$@"
}
export GODWIT_CONFIG=/tmp/c/ctl.toml
step ctl dev up --dir /tmp/c --hosts 2
"#;

const LIFE: &str = r#"
create --vcpus 2
goes_on booted
ctl vm console vm1 --log
step ctl migrate vm1 --to hostB
goes_on moved
step ctl checkpoint create vm1
kill -9 $(pidof vm-runner)
step ctl restore vm1 --to hostA
goes_on restored
ctl vm console vm1 --log
echo "LAB: end"
"#;

const REFUSAL: &str = r#"
create --cpu x86-64-v2
cat /tmp/said
echo "LAB: end"
"#;

#[test]
fn linux_on_kvm_amd_boots_works_moves_and_comes_back() {
    let Some(lab) = Lab::found() else { return };
    let said = lab.run(EPYC, &format!("{CLUSTER}{LIFE}"), PATIENCE);
    for done in ["goes on booted", "goes on moved", "goes on restored"] {
        assert!(said.contains(&format!("LAB: done: {done}")), "{done}:\n{said}");
    }
    assert!(said.contains("godwit: disk is mounted") && said.contains("LAB: end"), "{said}");
    for trouble in ["LAB: FAILED", "DAMAGED", "BUG:", "Oops", "panic:", "I/O error", "Call Trace"] {
        assert!(!said.contains(trouble), "{trouble} in:\n{said}");
    }
}

#[test]
fn a_host_without_an_instruction_says_which() {
    let Some(lab) = Lab::found() else { return };
    let said = lab.run(&format!("{EPYC},-sse4.2"), &format!("{CLUSTER}{REFUSAL}"), PATIENCE);
    assert!(said.contains("LAB: FAILED: ctl vm create vm1"), "{said}");
    assert!(said.contains("it lacks CPUID 0000_0001.0 ECX[20] sse4.2"), "{said}");
}
