//! `ctl vm gdb`: gdb on a live VM, through the controller.
//!
//! ```text
//!   gdb ──TCP──> here ──Debug──> controller ──> agent: gdb's protocol is served there
//! ```
//! One gdb at a time; the next one waits until it has gone. When a connection ends, however that is, the guest goes on. Knows
//! nothing of what is said.

use std::net::SocketAddr;

use proto::status::Code;
use proto::v1::{DebugBytes, VmName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::client::Client;
use super::failure::Failure;
use super::interrupts::Interrupts;

const CHUNK_BYTES: usize = 16 << 10;

/// Serves gdb until it is interrupted.
///
/// # Errors
/// No such VM, or the address cannot be listened at.
pub async fn run(mut client: Client, vm: &str, listen: SocketAddr) -> Result<(), Failure> {
    let doing = format!("debug {vm}");
    client.get_vm_record(VmName { vm: vm.to_owned() }).await.map_err(|e| Failure::from_status(&doing, &e))?;
    let refused = |e: std::io::Error| {
        Failure::new(Code::BadInput, format!("{listen}: {e}: give --listen a free address, such as 127.0.0.1:0"))
    };
    let listener = TcpListener::bind(listen).await.map_err(refused)?;
    let local = listener.local_addr().map_err(refused)?;
    let mut interrupts = Interrupts::listen()?;
    println!("gdb: target remote {local}");
    eprintln!(
        "{vm} stands still while gdb has it; a live guest only goes forwards, `ctl replay` goes back. Ctrl-C ends this."
    );
    loop {
        let serve = async {
            let (gdb, peer) = listener.accept().await.map_err(refused)?;
            eprintln!("gdb from {peer}");
            match carry(&mut client, vm, gdb).await {
                Ok(()) => eprintln!("gdb has gone; waiting for the next one"),
                Err(failure) => eprintln!("{failure}; waiting for the next gdb"),
            }
            Ok(())
        };
        tokio::select! {
            served = serve => served?,
            // The stream ends with us, and the guest goes on.
            () = interrupts.next() => return Ok(()),
        }
    }
}

/// Carries the bytes of one gdb until either side ends.
async fn carry(client: &mut Client, vm: &str, gdb: TcpStream) -> Result<(), Failure> {
    let failed = |e: tonic::Status| Failure::from_status(&format!("debug {vm}"), &e);
    // It only makes answers quicker.
    let _ = gdb.set_nodelay(true);
    let (say, said) = mpsc::channel(16);
    let first = DebugBytes { vm: vm.to_owned(), ..DebugBytes::default() };
    say.try_send(first).expect("the channel is new and holds 16");
    let mut told = client.debug(ReceiverStream::new(said)).await.map_err(failed)?.into_inner();
    let (mut from, mut to) = gdb.into_split();
    let up = async {
        let mut bytes = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            let data = bytes[..count].to_vec();
            if say.send(DebugBytes { data, ..DebugBytes::default() }).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        while let Some(message) = told.message().await.map_err(failed)? {
            if to.write_all(&message.data).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = down => ended,
        () = up => Ok(()),
    }
}
