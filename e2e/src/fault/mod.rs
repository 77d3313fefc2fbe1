//! Faults between processes: a TCP proxy that cuts, stalls, delays or damages what it carries.
//!
//! A fault strikes a connection after so many bytes from the side that connected, so that small calls pass and streams of
//! pages do not. Where it strikes follows from a [`Seed`], which the test prints. It refuses to know what it carries.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often a connection that stands still looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);
const PIECE_BYTES: usize = 64 << 10;

/// What happens to connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Both directions are closed.
    Cut {
        /// After so many bytes.
        after_bytes: u64,
    },
    /// Nothing passes any more, and nobody is told.
    Stall {
        /// After so many bytes.
        after_bytes: u64,
    },
    /// One bit is another one.
    Flip {
        /// After so many bytes.
        after_bytes: u64,
    },
    /// Every piece waits.
    Delay {
        /// How long, milliseconds.
        ms: u64,
    },
}

/// Numbers that follow from one number (splitmix64).
#[derive(Clone, Copy, Debug)]
pub struct Seed(pub u64);

impl Seed {
    /// The next number in `low..high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        low + (word ^ (word >> 31)) % (high - low)
    }
}

#[derive(Default)]
struct Shared {
    fault: Mutex<Fault>,
    struck: AtomicU64,
    ended: AtomicBool,
}

impl Shared {
    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// A proxy in front of one address.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port of the loopback address and carries everything to `target`.
    ///
    /// # Panics
    /// There is no free port.
    pub fn before(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared::default());
        let carried = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if carried.ended() {
                    return;
                }
                // Nobody there is what the client would have heard without us, too.
                if let Ok(server) = TcpStream::connect(target) {
                    carry(client, server, &carried);
                }
            }
        });
        Proxy { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on this happens, also to connections that stand.
    pub fn set(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// How many connections a fault has struck.
    pub fn struck(&self) -> u64 {
        self.shared.struck.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the listener, so that it sees it.
        let _ = TcpStream::connect(self.address);
    }
}

fn carry(client: TcpStream, server: TcpStream, shared: &Arc<Shared>) {
    let both = |stream: &TcpStream| stream.set_nodelay(true).and_then(|()| stream.try_clone());
    let (Ok(client_too), Ok(server_too)) = (both(&client), both(&server)) else { return };
    let (up, down) = (Arc::clone(shared), Arc::clone(shared));
    std::thread::spawn(move || pump(client, server, &up, Direction::Up));
    std::thread::spawn(move || pump(server_too, client_too, &down, Direction::Down));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared, direction: Direction) {
    let mut piece = vec![0; PIECE_BYTES];
    let (mut carried, mut struck) = (0u64, false);
    while let Ok(bytes @ 1..) = from.read(&mut piece) {
        let before = carried;
        carried += bytes as u64;
        let mut strikes = |after: u64| {
            let strikes = direction == Direction::Up && carried > after && (!struck || before <= after);
            if strikes && !std::mem::replace(&mut struck, true) {
                shared.struck.fetch_add(1, Ordering::Relaxed);
            }
            strikes
        };
        match shared.fault() {
            Fault::Cut { after_bytes } if strikes(after_bytes) => break,
            Fault::Stall { after_bytes } if strikes(after_bytes) => {
                while matches!(shared.fault(), Fault::Stall { .. }) && !shared.ended() {
                    std::thread::sleep(LOOK);
                }
            }
            Fault::Flip { after_bytes } if strikes(after_bytes) => {
                let at = after_bytes.saturating_sub(before) as usize;
                piece[at.min(bytes - 1)] ^= 1 << (after_bytes % 8);
            }
            Fault::Delay { ms } => std::thread::sleep(Duration::from_millis(ms)),
            Fault::None | Fault::Cut { .. } | Fault::Stall { .. } | Fault::Flip { .. } => {}
        }
        if shared.ended() || to.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    // The other direction ends by it.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut back = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut stream, &mut back);
                });
            }
        });
        address
    }

    fn answer(proxy: &Proxy, sent: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut back = stream.try_clone().unwrap();
        let sent = sent.to_vec();
        let writing = std::thread::spawn(move || {
            let _ = stream.write_all(&sent);
            let _ = stream.shutdown(Shutdown::Write);
        });
        let mut received = Vec::new();
        let _ = back.read_to_end(&mut received);
        writing.join().unwrap();
        received
    }

    #[test]
    fn each_fault_strikes_where_it_should() {
        let proxy = Proxy::before(echo());
        let sent = vec![0; 300_000];
        proxy.set(Fault::Flip { after_bytes: 100_003 });
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let bytes = sent.clone();
        let writing = std::thread::spawn(move || writer.write_all(&bytes));
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).unwrap();
        writing.join().unwrap().unwrap();
        let damaged: Vec<usize> = (0..received.len()).filter(|at| received[*at] != 0).collect();
        assert_eq!((damaged.as_slice(), received[100_003]), (&[100_003][..], 1 << 3));
        proxy.set(Fault::Cut { after_bytes: 100_000 });
        assert!(answer(&proxy, &sent).len() <= 100_000);
        assert_eq!(proxy.struck(), 2);
    }
}
