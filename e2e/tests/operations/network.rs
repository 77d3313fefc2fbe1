//! A guest's card on a real wire: two hosts with a bridge and a tap each, joined by a third bridge, all in a network
//! namespace of the test. After the hand-over the wire sees the guest's announcements, and the bridge between the hosts
//! sends to the new one; a Linux guest (deploy/guest) answers pings before and after.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use e2e::cluster::{Cluster, wait};
use e2e::linux::{Linux, asked};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use super::{BUSY, is_root, runs, skip};

const MAC: &str = "02:67:6f:64:77:01";
const MAC_BYTES: [u8; 6] = [0x02, 0x67, 0x6f, 0x64, 0x77, 0x01];
/// Set where `inside` runs.
const INSIDE: &str = "GODWIT_TEST_NAMESPACE";
const GUEST: &str = "10.77.0.9";

#[test]
fn a_guest_is_announced_on_the_wire_of_its_new_host() {
    let tools = ["ip", "bridge", "unshare", "mount"];
    let missing = tools.iter().find(|tool| !runs("sh", &["-c", &format!("command -v {tool}")]));
    if let (false, _) | (_, Some(_)) = (is_root(), missing) {
        return skip(&format!("a real tap: needs root and {tools:?}"));
    }
    if !runs("unshare", &["-n", "-m", "true"]) || !Path::new("/dev/net/tun").exists() {
        return skip("a real tap: network namespaces or /dev/net/tun are not to be had here");
    }
    // This program again, in namespaces of its own: devices, names and mounts end with it.
    let inside = "mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run && exec \"$0\" --exact network::inside --ignored --nocapture";
    let this = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    let output = command.args(["-n", "-m", "sh", "-c", inside]).arg(this).env(INSIDE, "1").output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}

fn ip(line: &str) {
    assert!(runs("ip", &line.split_whitespace().collect::<Vec<_>>()), "ip {line}");
}

/// The middle: bridge `wire` with 10.77.0.254. Each host: a namespace with bridge `lan`, on it `uplink` (to the wire) and `tap0`.
fn lay_wires() {
    ip("link set lo up");
    ip("link add wire type bridge forward_delay 0");
    ip("addr add 10.77.0.254/24 dev wire");
    ip("link set wire up");
    for (host, address) in [("hostA", "10.77.0.1/24"), ("hostB", "10.77.0.2/24")] {
        ip(&format!("netns add {host}"));
        ip(&format!("link add to-{host} type veth peer name uplink netns {host}"));
        ip(&format!("link set to-{host} master wire up"));
        ip(&format!("-n {host} link set lo up"));
        ip(&format!("-n {host} link add lan type bridge forward_delay 0"));
        ip(&format!("-n {host} addr add {address} dev lan"));
        ip(&format!("-n {host} tuntap add dev tap0 mode tap"));
        for port in ["uplink", "tap0"] {
            ip(&format!("-n {host} link set {port} master lan up"));
        }
        ip(&format!("-n {host} link set lan up"));
    }
}

/// Frames that came by, from the guest.
type Seen = Arc<Mutex<Vec<Vec<u8>>>>;

fn listen() -> Seen {
    // ETH_P_ALL, in network order: every frame of every device of this namespace.
    let protocol = Protocol::from_raw(std::num::NonZero::new(u32::from(3u16.to_be())).unwrap());
    let socket =
        rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol)).unwrap();
    let seen = Seen::default();
    let heard = Arc::clone(&seen);
    std::thread::spawn(move || {
        let mut frame = vec![0; 2048];
        while let Ok((bytes, _)) = rustix::net::recv(&socket, &mut frame[..], RecvFlags::empty()) {
            if bytes >= 42 && frame[6..12] == MAC_BYTES {
                heard.lock().unwrap().push(frame[..bytes].to_vec());
            }
        }
    });
    seen
}

/// On which port the wire's bridge has seen the guest last.
fn port_of_guest() -> Option<String> {
    let output = Command::new("bridge").args(["fdb", "show", "br", "wire"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with(MAC))?;
    line.split_whitespace().skip_while(|word| *word != "dev").nth(1).map(str::to_owned)
}

fn pings() -> bool {
    Command::new("busybox").args(["ping", "-c", "1", "-W", "1", GUEST]).output().is_ok_and(|o| o.status.success())
}

fn answers(when: &str) {
    wait(&format!("the guest to answer a ping {when}"), || pings().then_some(()));
}

#[test]
#[ignore = "run by a_guest_is_announced_on_the_wire_of_its_new_host, in a namespace of its own"]
fn inside() {
    if std::env::var_os(INSIDE).is_none() {
        return skip("not in a namespace of its own: wires are not laid in the machine's");
    }
    lay_wires();
    let cluster = Cluster::up(2);
    let port = cluster.setting("controller", "listen").rsplit_once(':').unwrap().1.to_owned();
    let mut daemons = vec![cluster.restart_with(
        "controller",
        &[("listen", &format!("\"0.0.0.0:{port}\"")), ("address", &format!("\"10.77.0.254:{port}\""))],
        &[],
    )];
    for (host, address) in [("hostA", "10.77.0.1"), ("hostB", "10.77.0.2")] {
        let listen = format!("\"{address}:7401\"");
        let controller = format!("\"10.77.0.254:{port}\"");
        let changes = [("listen", listen.as_str()), ("address", &listen), ("controller", &controller)];
        daemons.push(cluster.restart_with(host, &changes, &["ip", "netns", "exec", host]));
    }
    for host in ["hostA", "hostB"] {
        wait(&format!("{host} to be up on its own wire"), || {
            let found = cluster.ctl(["host", "show", host, "-o", "json"]);
            let found: serde_json::Value = serde_json::from_str(&found.stdout).ok()?;
            (found["state"] == "up" && found["address"].as_str()?.starts_with("10.77.")).then_some(())
        });
    }
    let linux = boot(&cluster);
    if linux {
        answers("before the migration");
        assert_eq!(port_of_guest().as_deref(), Some("to-hostA"));
    }
    let seen = listen();
    let moved = cluster.json(["migrate", "vm1", "--to", "hostB"]);
    assert_eq!(moved["source_digest"], moved["target_digest"]);
    for (name, ethertype, operation) in [("RARP", [0x80, 0x35], 3), ("ARP", [0x08, 0x06], 1)] {
        wait(&format!("a {name} announcement on the wire"), || {
            let told = |frame: &Vec<u8>| {
                frame[..6] == [0xff; 6]
                    && frame[12..14] == ethertype
                    && frame[20..22] == [0, operation]
                    && frame[22..28] == MAC_BYTES
            };
            seen.lock().unwrap().iter().any(told).then_some(())
        });
    }
    assert_eq!(port_of_guest().as_deref(), Some("to-hostB"), "the bridge between the hosts still sends to the old one");
    if linux {
        answers("after the migration");
        // And back, through the controller.
        cluster.ok(["migrate", "vm1", "--to", "hostA", "--via", "controller"]);
        answers("after the way back");
        assert_eq!(port_of_guest().as_deref(), Some("to-hostA"));
    } else {
        cluster.goes_on("vm1", 3);
    }
    drop(cluster);
    for mut daemon in daemons {
        daemon.wait().unwrap();
    }
}

/// The Linux of deploy/guest with an address, if it is there; the in-tree guest otherwise.
fn boot(cluster: &Cluster) -> bool {
    let net = format!("tap=tap0,mac={MAC}");
    let Some(linux) = Linux::found().filter(|_| runs("busybox", &["true"])) else {
        skip("pings: no Linux guest, or no busybox");
        let memory = BUSY.memory_bytes().to_string();
        cluster.create_with("vm1", "hostA", BUSY, &["--memory", &memory, "--net", &net]);
        cluster.goes_on("vm1", 3);
        return false;
    };
    let cmdline = format!("{} godwit.work=off", linux.cmdline());
    let (kernel, initrd) = (linux.file("vmlinuz"), linux.file("initramfs.cpio"));
    let args = ["vm", "create", "vm1", "--host", "hostA", "--memory", "256M", "--net", &net, "--kernel", &kernel];
    cluster.ok(args.into_iter().chain(["--initrd", &initrd, "--cmdline", &cmdline]));
    wait("Linux to be up", || cluster.console("vm1").contains("guest# ").then_some(()));
    let address = format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; echo net-is-$((40 + 2))");
    asked(cluster, "vm1", &address, |console| console.contains("net-is-42").then_some(()));
    true
}
