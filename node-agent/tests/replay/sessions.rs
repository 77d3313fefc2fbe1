//! Real gdb sessions, and clients that speak nonsense.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::files::{Directory, recording, seed};
use crate::replaying::{PATCHED, Random, TURNS};

/// `vm-replay` that serves gdb.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(file: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vm-replay"))
            .arg(file)
            .args(arguments)
            .args(["--gdb", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told =
            lines.map(Result::unwrap).find_map(|line| line.strip_prefix("gdb: target remote ").map(str::to_owned));
        Self { child, address: told.unwrap() }
    }

    /// Runs gdb with these commands; what it said. `None` if there is no gdb.
    fn gdb(&self, commands: &[&str]) -> Option<String> {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", &format!("target remote {}", self.address)]);
        for command in commands {
            gdb.args(["-ex", command]);
        }
        let Ok(output) = gdb.stdin(Stdio::null()).output() else {
            eprintln!("SKIPPED: there is no gdb");
            return None;
        };
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        println!("{text}");
        Some(text)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn gdb_goes_forwards_and_backwards() {
    let directory = Directory::new("gdb");
    let (_, parts) = recording(300_000);
    let file = directory.file("one.gwr", &parts);
    let server = Server::start(&file, &["--to-instruction", "100000"]);
    let patched = format!("*{PATCHED:#x}");
    let commands = [
        &format!("break {patched}") as &str,
        "continue",
        "printf \"first %x\\n\", $rip",
        "stepi",
        "printf \"stepped %x\\n\", $rip",
        "reverse-stepi",
        "printf \"back %x\\n\", $rip",
        "continue",
        "reverse-continue",
        "printf \"before %x\\n\", $rip",
        "delete",
        &format!("hbreak {patched}"),
        "continue",
        "printf \"hard %x\\n\", $rip",
        "delete",
        &format!("set $turns = *(int*){TURNS:#x}"),
        &format!("watch *(int*){TURNS:#x}"),
        "reverse-continue",
        &format!("printf \"undone %d\\n\", $turns - *(int*){TURNS:#x}"),
        "continue",
        &format!("printf \"done %d\\n\", $turns - *(int*){TURNS:#x}"),
        "delete",
        "info registers cr0 mxcsr fctrl gs_base",
        "info threads",
        "x/1xw 0x2000000",
        &format!("set *(int*){TURNS:#x} = 7"),
        "monitor position",
        "monitor why",
        "monitor physical 0x100f00 16",
        &format!("monitor last-write {TURNS:#x} 4"),
        "monitor goto 200000",
        "maintenance flush register-cache",
        "monitor time",
        "reverse-continue",
        "continue",
        "monitor nonsense",
    ];
    let Some(said) = server.gdb(&commands) else { return };
    let has = |text: &str| assert!(said.contains(text), "{text:?} was not said");
    has(&format!("first {PATCHED:x}"));
    has(&format!("stepped {:x}", PATCHED + 5));
    has(&format!("back {PATCHED:x}"));
    has(&format!("before {PATCHED:x}"));
    has(&format!("hard {PATCHED:x}"));
    has("undone 1");
    has("done 0");
    has("Old value = ");
    has("cr0            0x");
    has("vCPU 0");
    has("Cannot access memory at address 0x2000000");
    has("Cannot access memory at address 0x200004");
    has("would be another history");
    has("0x000000100f00: ba");
    has("inc dword ptr [200004h]");
    has("instruction 200000");
    assert_eq!(said.matches("No more reverse-execution history").count(), 2, "both ends are ends");
    has("last-write ADDRESS|SYMBOL");
}

#[test]
fn a_client_may_go_and_another_come_until_one_kills() {
    let directory = Directory::new("clients");
    let (_, parts) = recording(200_000);
    let file = directory.file("one.gwr", &parts);
    let mut server = Server::start(&file, &["--to-instruction", "50000"]);
    for _ in 0..2 {
        let Some(said) = server.gdb(&["stepi", "monitor position", "detach"]) else { return };
        assert!(said.contains("instruction 5000"), "{said}");
    }
    server.gdb(&["kill"]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "a kill ends it");
        std::thread::yield_now();
    }
    assert!(server.child.wait().unwrap().success());
}

fn packet(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

#[test]
fn a_client_that_interrupts_gets_its_stop() {
    let directory = Directory::new("interrupts");
    let (_, parts) = recording(200_000);
    let file = directory.file("one.gwr", &parts);
    let server = Server::start(&file, &["--to-instruction", "50000"]);
    let mut stream = server.connect();
    // What is asked for and the interrupt come together: it has not moved far, and says that it was interrupted.
    for motion in [&b"vCont;c"[..], b"bc"] {
        stream.write_all(&[packet(b"QStartNoAckMode"), packet(motion), vec![3]].concat()).unwrap();
        let (mut said, mut byte) = (Vec::new(), [0]);
        while !said.ends_with(b"#") || !said.contains(&b'T') {
            stream.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains("$T02"), "{said}");
    }
}

#[test]
fn nonsense_ends_a_connection_and_nothing_else() {
    let directory = Directory::new("nonsense");
    let (_, parts) = recording(100_000);
    let file = directory.file("one.gwr", &parts);
    let mut server = Server::start(&file, &["--to-instruction", "50000"]);
    let seed = seed();
    println!("seed {seed}");
    let mut random = Random(seed);
    let known: [&[u8]; 14] = [
        b"g",
        b"m0,ffffffffffffffff",
        b"mffffffffffffffff,8",
        b"M200004,4:00000000",
        b"P0=00",
        b"Z2,0,0",
        b"Z0,0,zz",
        b"vCont;s:99",
        b"bs",
        b"qXfer:features:read:target.xml:ffffffff,ffffffff",
        b"qRcmd,zz",
        b"Hg99",
        b"p999",
        b"T7fffffff",
    ];
    for round in 0..30 {
        let mut stream = server.connect();
        let mut sent = Vec::new();
        for _ in 0..4 {
            if random.below(2) == 0 {
                let mut body = known[random.below(known.len() as u64) as usize].to_vec();
                if random.below(3) == 0 {
                    let at = random.below(body.len() as u64) as usize;
                    body[at] = random.next() as u8;
                }
                sent.extend(packet(&body));
            } else {
                sent.extend((0..random.below(60)).map(|_| random.next() as u8));
            }
        }
        // The server may hang up in the middle.
        let _ = stream.write_all(&sent);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
        assert!(server.child.try_wait().unwrap().is_none(), "round {round} ended it");
    }
    // Longer than any packet may be.
    let mut stream = server.connect();
    let _ = stream.write_all(&[b"$".to_vec(), vec![b'a'; 100_000]].concat());
    drop(stream);
    let mut stream = server.connect();
    stream.write_all(&packet(b"qSupported:multiprocess+")).unwrap();
    let mut first = [0; 2];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"+$");
}
