//! A way to an HTTP server on which things go wrong: each request is passed on, answered with something else, left without an
//! answer, or cut in the middle, as a plan says that sees the requests in order.
//!
//! One request a connection: what is passed on asks the server to close. Signatures stay valid, since `Host` and everything
//! that is signed goes through as it came. It knows just enough HTTP to find where a body ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Longest head of a request, bytes.
const HEAD_MAX: u64 = 64 << 10;

/// A request as a plan sees it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which request it is of all, from 0.
    pub number: usize,
    /// `PUT`.
    pub method: String,
    /// `/bucket/key?x=y`.
    pub target: String,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Action {
    /// It goes through, and so does its answer.
    Pass,
    /// It is answered with this status and no more; the server never sees it.
    Answer(u16),
    /// It is read, and nothing comes back until the client goes away.
    Stall,
    /// So many bytes of its body reach the server; then both ends are cut.
    CutBody(usize),
    /// It goes through; of the answer only so many bytes come back.
    CutAnswer(usize),
}

type Plan = dyn Fn(&Seen) -> Action + Send + Sync;

/// The way.
pub struct Proxy {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    stopped: Arc<AtomicBool>,
}

impl Proxy {
    /// Opens a way to `server`.
    ///
    /// # Panics
    /// There is no free port.
    pub fn start(server: SocketAddr, plan: impl Fn(&Seen) -> Action + Send + Sync + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (seen, stopped) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::new(AtomicBool::new(false)));
        let plan: Arc<Plan> = Arc::new(plan);
        let (requests, stop, count) = (seen.clone(), stopped.clone(), Arc::new(AtomicUsize::new(0)));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (plan, requests, count) = (plan.clone(), requests.clone(), count.clone());
                // A client that is cut off is what this is for; nobody else needs to know.
                std::thread::spawn(move || drop(serve(client, server, &*plan, &requests, &count)));
            }
        });
        Proxy { address, seen, stopped }
    }

    /// Where it begins.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests of a method whose target contains a text, so far.
    ///
    /// # Panics
    /// A connection's thread did.
    pub fn count(&self, method: &str, part: &str) -> usize {
        let seen = self.seen.lock().expect("no thread panics over it");
        seen.iter().filter(|seen| seen.method == method && seen.target.contains(part)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees that it is to end.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    client: TcpStream,
    server: SocketAddr,
    plan: &Plan,
    requests: &Mutex<Vec<Seen>>,
    count: &AtomicUsize,
) -> io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let Some((first, head, length)) = head(&mut reader)? else { return Ok(()) };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let seen = Seen { number: count.fetch_add(1, Ordering::SeqCst), method, target };
    let action = plan(&seen);
    requests.lock().expect("no thread panics over it").push(seen);
    let passed = match action {
        Action::CutBody(bytes) => length.min(bytes as u64),
        _ => length,
    };
    let mut body = vec![0; passed as usize];
    reader.read_exact(&mut body)?;
    let mut client = client;
    match action {
        Action::Answer(status) => {
            write!(client, "HTTP/1.1 {status} Planned\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
            client.shutdown(Shutdown::Write)?;
        }
        Action::Stall => drop(io::copy(&mut reader, &mut io::sink())?),
        Action::Pass | Action::CutBody(_) | Action::CutAnswer(_) => {
            let mut upstream = TcpStream::connect(server)?;
            upstream.write_all(format!("{first}\r\n{head}Connection: close\r\n\r\n").as_bytes())?;
            upstream.write_all(&body)?;
            match action {
                Action::CutBody(_) => upstream.shutdown(Shutdown::Both)?,
                Action::CutAnswer(bytes) => drop(io::copy(&mut upstream.take(bytes as u64), &mut client)?),
                _ => drop(io::copy(&mut upstream, &mut client)?),
            }
            client.shutdown(Shutdown::Both)?;
        }
    }
    Ok(())
}

/// First line, the other lines of the head but `Connection`, and the length of the body.
fn head(reader: &mut BufReader<TcpStream>) -> io::Result<Option<(String, String, u64)>> {
    let mut head = reader.by_ref().take(HEAD_MAX);
    let (mut first, mut rest, mut length) = (String::new(), String::new(), 0);
    if head.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let (name, value) = line.split_once(':').unwrap_or((line.trim_end(), ""));
        match name.to_ascii_lowercase().as_str() {
            "" => return Ok(Some((first.trim_end().to_owned(), rest, length))),
            "connection" => continue,
            "content-length" => length = value.trim().parse().unwrap_or(0),
            _ => {}
        }
        rest.push_str(&line);
    }
}
